"""How the keys and values of slots are kept, and how they are read.

A slot table holds one latent frame a slot: [*l b slots s a d], `l` being layers that lie side by
side. It is an array, or has fewer bits: `Scaled` or `NVFP4`.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num
from longlive_kernels.eight import eight_bits
from longlive_kernels.nvfp4.format import NVFP4
from longlive_kernels.nvfp4.quantize import dequantize


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["multiplied"]
)
@dataclasses.dataclass(frozen=True)
class Scaled:
    """Numbers in eight bits, int8 or e4m3, times a scale for each token and head: of slots, `*l`
    ends in b slots. multiplied: of keys, that they are multiplied as they are; queries and fresh
    keys are rounded to such numbers.
    """

    values: Num[Array, "*l s a d"]
    scales: Float[Array, "*l s a"]
    multiplied: bool = False


Kept = Array | Scaled | NVFP4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fresh:
    """Frames that are attended as they are, in the place of what their slots hold. A frame whose
    slot is past the last takes no place.
    """

    k: Float[Array, "b j s a d"]
    v: Float[Array, "b j s a d"]
    slots: Int[Array, "b j"]


def kind(kept: Kept) -> str:
    """How it is kept: "nvfp4", or the name of a type."""
    if isinstance(kept, NVFP4):
        return "nvfp4"
    return (kept.values if isinstance(kept, Scaled) else kept).dtype.name


def shape(kept: Kept, heads: int) -> tuple[int, ...]:
    """*l b slots s a d. Raises ValueError for rows that do not divide over heads."""
    if isinstance(kept, Scaled):
        return kept.values.shape
    if not isinstance(kept, NVFP4):
        return kept.shape
    *lead, rows, width = kept.shape
    if rows % heads:
        raise ValueError(f"{rows} rows of NVFP4 do not divide over {heads} heads")
    return (*lead, rows // heads, heads, width)


def rounded(x: Float[Array, "*n d"], like: Scaled) -> Scaled:
    """In as many bits as `like`, a scale for each row."""
    values, scales = eight_bits(x, like.values.dtype, -1)
    return Scaled(values, scales[..., 0], like.multiplied)


def of_layer(kept: Kept, layer: Int[Array, ""] | None) -> Kept:
    """One layer's slots, a copy unless there are no others."""
    return kept if layer is None else jax.tree.map(lambda x: x[layer], kept)


def of_slots(kept: Kept, layer: Int[Array, ""] | None, slots: Int[Array, "b c"]) -> Kept:
    """Some slots of each row of one layer: no more than these are copied."""
    rows = jnp.arange(slots.shape[0], dtype=slots.dtype)[:, None]
    where = (rows, slots) if layer is None else (layer, rows, slots)

    def pick(x: Array) -> Array:
        # As one axis: XLA for GPUs else turns the axes of the whole table, to spare those of slots.
        lead, rest = x.shape[: len(where)], x.shape[len(where) :]
        chosen = x.reshape(*lead, -1).at[where].get(mode="promise_in_bounds")
        return chosen.reshape(*slots.shape, *rest)

    return jax.tree.map(pick, kept)


def plain(kept: Kept, heads: int, dtype) -> Float[Array, "*l s a d"]:
    """The numbers, multiplied in float32, then cast."""
    if isinstance(kept, Scaled):
        numbers = kept.values.astype(jnp.float32) * kept.scales[..., None]
    else:
        numbers = dequantize(kept) if isinstance(kept, NVFP4) else kept
    return numbers.astype(dtype).reshape(shape(kept, heads))


def window(
    kept: Kept,
    heads: int,
    dtype,
    layer: Int[Array, ""] | None = None,
    fresh: Float[Array, "b j s a d"] | None = None,
    slots: Int[Array, "b j"] | None = None,
) -> Float[Array, "b slots s a d"]:
    """All slots of a layer as they are attended, `fresh` in the place of what `slots` hold."""
    numbers = plain(of_layer(kept, layer), heads, dtype)
    if fresh is None:
        return numbers
    rows = jnp.arange(numbers.shape[0])[:, None]
    return numbers.at[rows, slots].set(fresh.astype(dtype), mode="drop")


def divided(
    visible: Bool[Array, "b f slots"], fresh: Fresh
) -> tuple[Bool[Array, "b f slots"], Bool[Array, "b f j"]]:
    """What queries see of the table, and what of the fresh frames."""
    count = visible.shape[2]
    taken = (fresh.slots[:, :, None] == jnp.arange(count)).any(1)  # b slots
    inside = jnp.minimum(fresh.slots, count - 1)
    seen = jnp.take_along_axis(visible, inside[:, None], 2) & (fresh.slots < count)[:, None]
    return visible & ~taken[:, None], seen


def turned(x: Float[Array, "b *c d"], phases: Float[Array, "b *s p"]) -> Float[Array, "b *c d"]:
    """The first p pairs of neighbouring channels (2i, 2i + 1), each turned by its phase, in
    float32. phases: of as many axes, which spread over those of x.
    """
    cos, sin = jnp.cos(phases), jnp.sin(phases)
    count = 2 * phases.shape[-1]
    even, odd = (x[..., i:count:2].astype(jnp.float32) for i in range(2))
    pairs = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    pairs = pairs.reshape(*x.shape[:-1], count).astype(x.dtype)
    return jnp.concatenate([pairs, x[..., count:]], -1)
