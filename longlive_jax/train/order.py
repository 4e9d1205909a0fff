"""The order in which a teacher-forcing sequence lies on the devices.

Every device holds a contiguous part of the sequence. In Balanced SP (LongLive 2.0 section 2.1) the
sequence is [clean of rank 0, noisy of rank 0, clean of rank 1, …]: each rank has both halves of its
own range of the video, and so as much to compute as any other. In plain SP it is [all clean, all
noisy]: the first half of the ranks works on what has no loss. One device may use either.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from longlive_jax.dit import mask
from longlive_jax.dit.mask import Labels


@dataclasses.dataclass(frozen=True)
class Order:
    """`parts` pairs of a clean and a noisy range of the video. Balanced SP has a pair for each
    rank, plain SP one in all.
    """

    parts: int = 1

    def join(self, clean: Shaped[Array, "b f *c"], noisy: Shaped[Array, "b f *c"]) -> Array:
        """b 2f …: frames (or chunks) of the clean and the noisy video in this order."""
        pair = [x.reshape(x.shape[0], self.parts, -1, *x.shape[2:]) for x in (clean, noisy)]
        both = jnp.concatenate(pair, 2)  # b parts 2f/parts …
        return both.reshape(both.shape[0], -1, *both.shape[3:])

    def split(self, x: Shaped[Array, "b n *c"]) -> tuple[jax.Array, jax.Array]:
        """The inverse of `join`."""
        pairs = x.reshape(x.shape[0], self.parts, 2, -1, *x.shape[2:])
        clean, noisy = pairs[:, :, 0], pairs[:, :, 1]  # b parts f/parts …
        return tuple(y.reshape(y.shape[0], -1, *y.shape[3:]) for y in (clean, noisy))

    def labels(self, video: Labels) -> Labels:
        return mask.interleaved(video, self.parts)

    def table(self, video: Labels, *, window: int | None = None, sink: int = 0) -> np.ndarray:
        """Who attends whom, in this order."""
        return mask.table(self.labels(video), window=window, sink=sink)
