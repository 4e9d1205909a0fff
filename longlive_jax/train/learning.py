"""What of a network is learned: all of its weights, or a LoRA beside them (LongLive 2.0 section
4.1).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax import lora, weights
from longlive_jax.dit.model import DiT
from longlive_jax.lora import Lora
from longlive_jax.weights import Weights

A, B = ".lora_a", ".lora_b"  # ends of names


@dataclasses.dataclass(frozen=True)
class Learning:
    """rank: of a LoRA on every linear layer of the blocks; 0 is all weights. alpha: None is the
    rank.
    """

    rank: int = 0
    alpha: float | None = None

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"a LoRA has a rank of at least 1, or 0 for none, not {self.rank}")

    def begin(self, dit: DiT, key: jax.Array) -> Weights:
        """What there is to learn, in float32, before the first step: `build` makes `dit` of it."""
        if not self.rank:
            return {name: x.astype(jnp.float32) for name, x in weights.flatten(dit).items()}
        return flat(lora.init(dit, self.rank, key, alpha=self.alpha))

    def build(self, base: DiT, learned: Weights, dtype: Any) -> DiT:
        """The network. base: whose weights stay as they are; their shapes where all are learned."""
        if not self.rank:
            return weights.unflatten(base, {n: x.astype(dtype) for n, x in learned.items()})
        return lora.apply(base, self.adapter(learned))

    def adapter(self, learned: Weights) -> Lora:
        a = {name.removesuffix(A): x for name, x in learned.items() if name.endswith(A)}
        b = {name.removesuffix(B): x for name, x in learned.items() if name.endswith(B)}
        return Lora(a, b, self.alpha)


def flat(adapter: Lora) -> Weights:
    """A LoRA as weights with names of their own."""
    a = {name + A: x for name, x in adapter.a.items()}
    return a | {name + B: x for name, x in adapter.b.items()}
