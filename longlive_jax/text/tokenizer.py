"""Prompts to token ids (`wan/modules/tokenizers.py:HuggingfaceTokenizer`)."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from longlive_jax.text.clean import clean

EOS = "</s>"


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
    never its `eos`.
    """

    pieces: Callable[[str], list[int]]
    eos: int
    pad: int
    text_len: int

    def __call__(
        self, prompts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
        ids = np.full((len(prompts), self.text_len), self.pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, prompt in enumerate(prompts):
            found = [*self.pieces(clean(prompt))[: self.text_len - 1], self.eos]
            ids[row, : len(found)] = found
            mask[row, : len(found)] = True
        return ids, mask


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
    if eos is None:
        raise ValueError(f"its vocabulary lacks {EOS}")
    return PieceTokenizer(pieces, eos, 0 if pad is None else pad, text_len)


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
    return PieceTokenizer(
        processor.encode_as_ids, processor.eos_id(), max(processor.pad_id(), 0), text_len
    )


def load(folder: str | os.PathLike, text_len: int) -> PieceTokenizer:
    """The tokenizer of a model's folder: its `tokenizer.json`, or else its `spiece.model`.

    Raises ValueError, one sentence, if there is neither or it cannot be read.
    """
    folder = pathlib.Path(folder)
    readers = {
        "tokenizer.json": lambda path: from_json(path.read_text("utf-8"), text_len),
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
