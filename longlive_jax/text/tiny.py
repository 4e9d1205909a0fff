"""The tokenizer of the tiny model: one id per word of the toy world's captions."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable

from longlive_jax.data.caption import WORDS
from longlive_jax.text.tokenizer import PieceTokenizer, from_json

SPECIALS = ("<pad>", "</s>", "<unk>")
TEXT_LEN = 40
"""Tokens of a prompt; the longest caption of the toy world, two things after a cut, takes 35."""


def tiny_tokenizer_json(words: Iterable[str]) -> str:
    """A word-level tokenizer in the `tokenizers` library's JSON.

    Case is ignored, punctuation only separates words, and other words become `<unk>`. Ids follow
    the order of `words`, after those of `SPECIALS`.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocab = {word: i for i, word in enumerate([*SPECIALS, *words])}
    model = Tokenizer(models.WordLevel(vocab, unk_token=SPECIALS[2]))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("removed")]
    )
    return model.to_str(pretty=True)


def tiny_tokenizer(text_len: int = TEXT_LEN) -> PieceTokenizer:
    """The tokenizer of the toy world's words, built on the spot."""
    return from_json(tiny_tokenizer_json(WORDS), text_len)


def write(path: str | os.PathLike) -> None:
    """Saves the tokenizer of the toy world's words, as the package ships it."""
    pathlib.Path(path).write_text(tiny_tokenizer_json(WORDS) + "\n", "utf-8")
