"""How the keys and values of a slot table are kept: as numbers, or in fewer bits (LongLive 2.0
section 3.2; `utils/quant.py`, `causal_model.py:_apply_cache_updates`).

A way of keeping is a leaf type of the table, and registers what `enter` does with it, and how
`table` hands it to attention. An array takes every pass of a chunk. What has fewer bits takes the
clean pass only: a frame is quantised once, and a chunk attends its own keys and values as they are.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from longlive_kernels.attention import sink_window as kernel
from longlive_kernels.eight import eight_bits
from longlive_kernels.nvfp4 import NVFP4
from longlive_kernels.nvfp4.quantize import quantize

Frames = Float[Array, "b f s a d"]
Parts = dict[str, Array]  # each [*lead, …], lead being what is kept side by side


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Place:
    """Where the frames of a call go. slots: one past the last leaves no trace. chunk: of each
    frame. final: this is their clean pass.
    """

    layer: Int[Array, ""]
    slots: Int[Array, "b f"]
    chunk: Int[Array, "b f"]
    final: bool = dataclasses.field(metadata=dict(static=True))

    def put(self, kept: Array, new: Array) -> Array:
        """`new` b f … into [layers b slots …]."""
        rows = jnp.arange(self.slots.shape[0])[:, None]
        return kept.at[self.layer, rows, self.slots].set(new.astype(kept.dtype), mode="drop")


@functools.singledispatch
def enter(kept: Any, new: Frames, place: Place) -> Any:
    """Keeps the frames of a call in one layer's slots. Returns what is kept then."""
    return place.put(kept, new)


@functools.singledispatch
def table(kept: Any) -> Any:
    """What `sink_window` reads, of all layers: the same arrays."""
    return kept


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A number in eight bits, times a scale for each token and head. scores: of products of keys as
    they are kept, for which attention rounds what they are multiplied with. In `encode`, `same`
    says which frames of a call are of one chunk.
    """

    dtype: Any
    scores: bool = False

    def empty(self, lead: tuple[int, ...], s: int, a: int, d: int) -> Parts:
        return {
            "values": jnp.zeros((*lead, s, a, d), self.dtype),
            "scales": jnp.zeros((*lead, s, a), jnp.float32),
        }

    def encode(self, x: Frames, same: Array) -> Parts:
        del same
        values, scales = eight_bits(x, self.dtype, -1)
        return {"values": values, "scales": scales[..., 0]}

    def table(self, parts: Parts) -> kernel.Scaled:
        return kernel.Scaled(parts["values"], parts["scales"], self.scores)


@dataclasses.dataclass(frozen=True)
class FourBit:
    """NVFP4 in blocks of 16 along the head's width, one largest magnitude for each chunk."""

    rule: str = "mse"

    def empty(self, lead: tuple[int, ...], s: int, a: int, d: int) -> Parts:
        return {
            "packed": jnp.zeros((*lead, s * a, d // 2), jnp.uint8),
            "scales": jnp.zeros((*lead, s * a, d // 16), jnp.float8_e4m3fn),
            "amax": jnp.zeros(lead, jnp.float32),
        }

    def encode(self, x: Frames, same: Array) -> Parts:
        b, f, s, a, d = x.shape
        x = x.reshape(b, f, s * a, d).astype(jnp.float32)
        of_frame = jnp.abs(x).max((2, 3))
        amax = jnp.where(same, of_frame[:, None], 0.0).max(2)  # b f
        q = quantize(x, rule=self.rule, amax=amax)
        return {"packed": q.packed, "scales": q.scales, "amax": q.amax}

    def table(self, parts: Parts) -> NVFP4:
        return NVFP4(parts["packed"], parts["scales"], parts["amax"], self.rule)


Codec = Scaled | FourBit
CODECS: dict[str, Codec] = {
    "int8": Scaled(jnp.int8),
    "fp8": Scaled(jnp.float8_e4m3fn),
    "nvfp4": FourBit(),
}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["codec"])
@dataclasses.dataclass(frozen=True)
class LowBit:
    """parts: of all layers, each [layers b slots …], or what a transformation has in its place."""

    parts: dict[str, Any]
    codec: Codec


@enter.register
def _(kept: LowBit, new: Frames, place: Place) -> LowBit:
    if not place.final:
        return kept
    coded = kept.codec.encode(new, place.chunk[:, :, None] == place.chunk[:, None, :])
    parts = {name: place.put(part, coded[name]) for name, part in kept.parts.items()}
    return dataclasses.replace(kept, parts=parts)


@table.register
def _(kept: LowBit) -> kernel.Scaled | NVFP4:
    return kept.codec.table(kept.parts)


def empty(kind: str, shape: tuple[int, ...], dtype: Any, *, scores: bool = False) -> Any:
    """Nothing kept yet, for layers b slots s a d of a model that computes in `dtype`. scores: those
    of attention are to be products of eight-bit numbers, which `kind` is then.

    Raises ValueError for a head whose width cannot be kept so.
    """
    if kind not in CODECS:
        return jnp.zeros(shape, jnp.bfloat16 if kind == "bf16" else dtype)
    if kind == "nvfp4" and shape[-1] % 16:
        raise ValueError(f"nvfp4 keeps heads of a multiple of 16, not of {shape[-1]}")
    codec = CODECS[kind]
    codec = dataclasses.replace(codec, scores=True) if scores else codec
    return LowBit(codec.empty(shape[:3], *shape[3:]), codec)
