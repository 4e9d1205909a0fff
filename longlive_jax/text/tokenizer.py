"""Prompts to token ids (`wan/modules/tokenizers.py:HuggingfaceTokenizer`)."""

from __future__ import annotations

import bisect
import dataclasses
import os
import pathlib
import string
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from longlive_jax import documents
from longlive_jax.errors import InputError
from longlive_jax.text.clean import clean

EOS, UNKNOWN = "</s>", "<unk>"
LARGEST = 2**31  # ids are int32
_NAMED = 5  # unknown words that a note names
_SHOWN = 60  # characters of a prompt that a note shows


@runtime_checkable
class Tokenizer(Protocol):
    """Ids of prompts, all padded to one length, and where they are real."""

    def __call__(
        self, prompts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]: ...


@dataclasses.dataclass(frozen=True)
class PieceTokenizer:
    """Cleans a prompt, cuts it into pieces, ends it with `eos` and pads it to `text_len`.

    pieces: ids of a cleaned prompt, without specials. A prompt that is too long loses its tail,
    never its `eos`. unknown: the id of what is not in the vocabulary; None where everything is.
    """

    pieces: Callable[[str], list[int]]
    eos: int
    pad: int
    text_len: int
    unknown: int | None = None

    def __call__(
        self, prompts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
        ids = np.full((len(prompts), self.text_len), self.pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, prompt in enumerate(prompts):
            found = [*self.pieces(clean(prompt))[: self.text_len - 1], self.eos]
            if odd := [number for number in found if not 0 <= number < LARGEST]:
                raise InputError(f"token {odd[0]} is outside any vocabulary")
            ids[row, : len(found)] = found
            mask[row, : len(found)] = True
        return ids, mask

    def note(self, prompt: str) -> str:
        """Say in one line what of a prompt is not read: unknown words and a tail that is cut off.
        An empty line where all of it is read.
        """
        text = clean(prompt)
        said = ", and ".join(filter(None, (self._unknown_words(text), self._cut(text))))
        if not said:
            return ""
        return f'prompt "{_shortened(text, _SHOWN)}": {said}'

    def _unknown_words(self, text: str) -> str:
        if self.unknown is None or self.unknown not in self.pieces(text):
            return ""
        words = [w for w in dict.fromkeys(text.split()) if self.unknown in self.pieces(w)]
        bare = [word.strip(string.punctuation) or word for word in words or [text]]
        distinct = list(dict.fromkeys(bare))
        named = ", ".join(f'"{_shortened(word, _SHOWN)}"' for word in distinct[:_NAMED])
        more = len(distinct) - _NAMED
        return f"the model does not know {named}" + (f" and {more} more" if more > 0 else "")

    def _cut(self, text: str) -> str:
        room, count = self.text_len - 1, len(self.pieces(text))
        if count <= room:
            return ""

        def tokens(length: int) -> int:
            return len(self.pieces(text[:length]))

        # The longest beginning that fits. It is looked for at the start of a text of any length.
        above = min(room, len(text))
        while above < len(text) and tokens(above) <= room:
            above = min(2 * above, len(text))
        fitting = bisect.bisect_right(range(above), room, key=tokens) - 1
        read = " ".join(text[: max(fitting, 0)].split())
        where = f'"{_shortened(read, _SHOWN // 2, end=True)}"' if read else "its beginning"
        return f"only {room} of its {count} tokens are read: what follows {where} is left out"


def _shortened(text: str, length: int, *, end: bool = False) -> str:
    """Return at most `length` characters from a text's start or end; whole words if they fit."""
    if len(text) <= length:
        return text
    if end:
        tail = text[-length:]
        return f"…{tail.partition(' ')[2] or tail}"
    return f"{text[:length].rpartition(' ')[0] or text[:length]}…"


def from_json(text: str, text_len: int) -> PieceTokenizer:
    """A tokenizer in the `tokenizers` library's JSON.

    Raises ValueError where the text is not one, or its vocabulary lacks `</s>`.
    """
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"not a tokenizers file: {error}") from error
    model.no_truncation()
    model.no_padding()

    def pieces(prompt: str) -> list[int]:
        return model.encode(prompt, add_special_tokens=False).ids

    eos, pad = model.token_to_id(EOS), model.token_to_id("<pad>")
    unknown = model.token_to_id(UNKNOWN)
    if eos is None:
        raise ValueError(f"its vocabulary lacks {EOS}")
    return PieceTokenizer(pieces, eos, 0 if pad is None else pad, text_len, unknown)


def from_sentencepiece(model: bytes, text_len: int) -> PieceTokenizer:
    """A tokenizer from the bytes of a `spiece.model`.

    Raises ValueError where they are not one, or the vocabulary lacks `</s>`.
    """
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"not a sentencepiece model: {error}") from error
    if processor.eos_id() < 0:
        raise ValueError(f"its vocabulary lacks {EOS}")
    unknown = processor.unk_id()
    return PieceTokenizer(
        processor.encode_as_ids,
        processor.eos_id(),
        max(processor.pad_id(), 0),
        text_len,
        None if unknown < 0 else unknown,
    )


def load(folder: str | os.PathLike, text_len: int) -> PieceTokenizer:
    """The tokenizer of a model's folder: its `tokenizer.json`, or else its `spiece.model`.

    Raises ValueError, one sentence, if there is neither or it cannot be read.
    """
    folder = pathlib.Path(folder)
    readers = {
        "tokenizer.json": lambda path: from_json(documents.read_text(path), text_len),
        "spiece.model": lambda path: from_sentencepiece(path.read_bytes(), text_len),
    }
    for name, read in readers.items():
        path = folder / name
        if not path.exists():
            continue
        try:
            return read(path)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"cannot read the tokenizer {path}: {reason}") from error
    raise ValueError(f"no {' or '.join(readers)} in {folder}")
