"""Prompts to embeddings: the one interface of the official and the tiny text encoder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from longlive_jax.errors import InputError
from longlive_jax.text.tokenizer import PieceTokenizer, Tokenizer
from longlive_jax.text.umt5 import UMT5, encode


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """Embeds prompts, with zero rows up to `text_len` (`wan/modules/t5.py:T5EncoderModel`)."""

    umt5: UMT5
    tokenizer: Tokenizer
    text_len: int

    def __call__(self, prompts: Sequence[str]) -> Float[Array, "b text_len d"]:
        """Embeddings of prompts, one row a token.

        Raises InputError if the tokenizer pads beyond `text_len` or knows ids the encoder lacks.
        """
        ids, mask = self.tokenizer(prompts)
        if ids.shape[1] > self.text_len:
            raise InputError(
                f"the tokenizer gives {ids.shape[1]} tokens, the model takes {self.text_len}"
            )
        vocab = self.umt5.cfg.vocab
        if ids.max(initial=0) >= vocab:
            raise InputError(f"token {ids.max()} is outside the text encoder's {vocab} embeddings")
        return _encode(self.umt5, ids, mask, self.text_len)

    def note(self, prompt: str) -> str:
        """Say in one line what of a prompt the model does not read; an empty line for nothing."""
        return self.tokenizer.note(prompt) if isinstance(self.tokenizer, PieceTokenizer) else ""


@functools.partial(jax.jit, static_argnums=3)
def _encode(
    umt5: UMT5, ids: Int[Array, "b l"], mask: Bool[Array, "b l"], text_len: int
) -> Float[Array, "b text_len d"]:
    missing = text_len - ids.shape[1]
    return jnp.pad(encode(umt5, ids, mask), ((0, 0), (0, missing), (0, 0)))
