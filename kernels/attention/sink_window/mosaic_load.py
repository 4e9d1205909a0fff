"""What the loading warpgroup of a kernel of mosaic.py does: copies tiles of keys and values to
shared memory, and unpacks there what has fewer bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Int32
from longlive_kernels import jax_versions
from longlive_kernels.attention import mosaic_block as block
from longlive_kernels.attention.sink_window.mosaic import HALF, WIDTH, Plan
from longlive_kernels.attention.sink_window.mosaic_kernel import Work
from longlive_kernels.attention.tile import ROWS
from longlive_kernels.nvfp4.matmul.mixed import doubled

Ref = Any  # of Mosaic, to arrays or parts of them
Load = Callable[[Array, Array], None]  # of which tile, to which stage
MAGIC = 0x4B000000  # the bits of 2^23: a byte in the lowest of them is added to it


def scratch(plan: Plan) -> dict:
    """What is copied as it lies, if it is unpacked; scales of what is not."""
    keys, made = plan.blocks.keys, {}
    width = HALF if plan.kind == "nvfp4" else WIDTH
    for name in plan.unpacked:
        made[f"{name}_raw"] = plgpu.SMEM((keys, width), jnp.uint8)
        made[f"{name}_scales"] = plgpu.SMEM((plan.scales, keys), jnp.float32)
        made[f"{name}_copied"] = plgpu.Barrier(num_arrivals=2)
    if plan.eight:
        made["k_scales"] = plgpu.SMEM((plan.blocks.stages, 1, keys), jnp.float32)
    return made


def stream(own, work: Work):
    """All tiles that the block's lists name, each where one was that is done with."""
    lists, plan = work.lists, work.plan
    stages, done = jnp.int32(plan.blocks.stages), jnp.int32(0)
    column = 1 + len(plan.lists)
    for number, length in enumerate(plan.lists):
        total = lists[work.frame, 1 + number] * plan.parts
        base = lists[work.frame, 0] if number == 0 else jnp.int32(0)
        place = Place(work, lists, column, base, total, plan)
        loads = {}
        for name, refs in zip("kv", work.sources[number], strict=True):
            unpacks = number == 0 and name in plan.unpacked
            loads[name] = (_unpacked if unpacks else _copied)(own, name, refs, place)

        def step(at, _, loads=loads, done=done):
            stage = lax.rem(done + at, stages)
            for name, load in loads.items():
                consumed = getattr(own, f"{name}_consumed").at[stage]
                pl.when(done + at >= stages)(lambda consumed=consumed: plgpu.barrier_wait(consumed))
                load(at, stage)

        lax.fori_loop(0, total, step, None)
        done, column = done + total, column + length

    def wait(at, _):
        for name in "kv":
            plgpu.barrier_wait(getattr(own, f"{name}_consumed").at[lax.rem(at, stages)])

    lax.fori_loop(jnp.maximum(done - stages, 0), done, wait, None)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the tiles of a list are. column: where the list begins. base: the first slot of the
    layer. total: how many tiles.
    """

    work: Work
    lists: Ref
    column: int
    base: Array
    total: Array
    plan: Plan

    def of(self, at: Array) -> tuple[Array, Array]:
        """The slot, and the first token."""
        parts = jnp.int32(self.plan.parts)
        slot = self.lists[self.work.frame, self.column + lax.div(at, parts)]
        return slot, lax.rem(at, parts) * self.plan.blocks.keys

    def tile(self, x: Ref, at: Array) -> Ref:
        """Rows of one head. What lies beyond the slot is read as zeros."""
        (slot, token), width = self.of(at), x.shape[2] // self.plan.heads
        columns = pl.ds(self.work.head * width, width)
        return x.at[self.base + slot, pl.ds(token, self.plan.blocks.keys), columns]

    def scales(self, x: Ref, at: Array) -> Ref:
        slot, token = self.of(at)
        return x.at[slot, self.work.head, :, pl.ds(token, self.plan.blocks.keys)]


def _copied(own, name: str, refs: tuple[Ref, ...], place: Place) -> Load:
    """Tiles as they lie, with their scales if there are any."""

    def load(at, stage):
        loaded, tile = (getattr(own, f"{name}_{x}").at[stage] for x in ("loaded", "tile"))
        plgpu.copy_gmem_to_smem(place.tile(refs[0], at), tile, loaded)
        for scales in refs[1:]:
            held = getattr(own, f"{name}_scales").at[stage]
            plgpu.copy_gmem_to_smem(place.scales(scales, at), held, loaded)

    return load


def _unpacked(own, name: str, refs: tuple[Ref, ...], place: Place) -> Load:
    """Tiles that are copied, one ahead, and unpacked. refs: the slots and the scales."""
    raw, held, copied = (getattr(own, f"{name}_{x}") for x in ("raw", "scales", "copied"))

    def fetch(at):
        plgpu.copy_gmem_to_smem(place.tile(refs[0], at), raw, copied)
        plgpu.copy_gmem_to_smem(place.scales(refs[1], at), held, copied)

    def load(at, stage):
        loaded, tile = (getattr(own, f"{name}_{x}").at[stage] for x in ("loaded", "tile"))
        plgpu.barrier_wait(copied)
        unpack(raw, held, tile, place.plan)
        plgpu.commit_smem()  # all threads have read, too
        pl.when(at + 1 < place.total)(lambda: fetch(at + 1))
        plgpu.barrier_arrive(loaded)

    pl.when(place.total > 0)(lambda: fetch(jnp.int32(0)))
    return load


def unpack(raw: Ref, scales: Ref, tile: Ref, plan: Plan):
    """A tile as bfloat16: number times scale, in float32, half of the channels at a time. Of NVFP4
    the even ones come first.
    """
    for first in range(0, plan.blocks.keys, ROWS):
        rows = pl.ds(first, ROWS)
        factors = [block.per_row(scales.at[i, rows]) for i in range(scales.shape[0])]
        factor = _spread(factors)
        if plan.kind == "nvfp4":
            codes = _bytes(raw.at[rows])
            numbers = [doubled((codes >> shift) & 15).astype(jnp.float32) for shift in (0, 4)]
        else:
            number = {"int8": _int8, "float8_e4m3fn": _e4m3}[plan.kind]
            halves = (raw.at[rows, pl.ds(start, HALF)] for start in (0, HALF))
            numbers = (number(_bytes(half)) for half in halves)
        for i, x in enumerate(numbers):
            tile.at[rows, pl.ds(i * HALF, HALF)][...] = (x * factor).astype(jnp.bfloat16)


def _bytes(raw: Ref) -> Int32[Array, "r c"]:
    return jax_versions.load(raw, layout=block.LAYOUT, optimized=False).astype(jnp.int32)


def _spread(factors: list[Array]) -> Float32[Array, "r c"]:
    """Each in as many columns. Threads know their columns as they are compiled, so that nothing is
    left of the comparisons.
    """
    shape = (ROWS, HALF)
    place = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=block.LAYOUT)
    chosen = block.across(factors[0], shape)
    for i, each in enumerate(factors[1:], 1):
        chosen = jnp.where(place < i * (HALF // len(factors)), chosen, block.across(each, shape))
    return chosen


def _int8(x: Int32[Array, "r c"]) -> Float32[Array, "r c"]:
    """Of bytes: without a conversion, which GPUs do at a fraction of the rate of sums."""
    bits = (x ^ 128) | MAGIC
    return lax.bitcast_convert_type(bits, jnp.float32) - jnp.float32(2**23 + 128)


def _e4m3(x: Int32[Array, "r c"]) -> Float32[Array, "r c"]:
    """Of bytes. Subnormal ones, 2^-9 apart, are twice what numbers 2^-10 apart have above 2^-7."""
    size = x & 127
    number = lax.bitcast_convert_type((size << 20) + (120 << 23), jnp.float32)
    number = jnp.where(size < 8, 2 * (number - jnp.float32(2**-7)), number)
    return jnp.where(x < 128, number, -number)
