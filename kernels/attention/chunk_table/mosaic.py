"""Attention for Hopper and Blackwell, and its gradient, in Pallas for Mosaic GPU.

Three kernels for Hopper (sm_90): mosaic_forward.py, mosaic_queries.py (the gradient of q) and
mosaic_keys.py (those of k and v). As many for Blackwell: mosaic_tcgen05.py, and two in
mosaic_tcgen05_gradient.py. Each reads the tiles of mosaic_lists.py and no other. A tile lies where
its run begins, or a multiple of its size behind that; the last of a run that is no multiple of it
is read with what follows, whose weights are zero, and which must be finite.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32
from longlive_kernels import arch
from longlive_kernels.attention.chunk_table import mosaic_lists, tiles, vjp
from longlive_kernels.attention.chunk_table.table import Table
from longlive_kernels.attention.tile import SLAB, TILE, UNITS, unsuited

WIDTHS = (64, 128)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """tile: tokens of the tiles that are loaded one after the other. stages: of them that are
    loaded ahead. registers: of a thread that loads, and of one that multiplies.
    """

    tile: int
    stages: int
    registers: tuple[int, int]


# Of Hopper: forwards, the gradient of q, those of k and v.
FORWARD = Blocks(tile=128, stages=2, registers=(40, 232))
QUERIES = Blocks(tile=128, stages=2, registers=(24, 240))
KEYS = Blocks(tile=64, stages=4, registers=(24, 240))
# Of Blackwell: forwards, and gradients. Of these, stages are shared out to the warpgroups that make
# weights, as many for each.
BLACKWELL = Blocks(tile=128, stages=2, registers=(24, 232))
GRADIENT = Blocks(tile=64, stages=4, registers=(24, 232))

Heads = BFloat16[Array, "b n a d"]
Keys = BFloat16[Array, "b m a d"]
Sums = Float32[Array, "b a p"]


def unsupported(q: Array, k: Array, v: Array, table: Table, *, sm: int | None = None) -> str | None:
    """Why a call cannot run here; None if it can. sm: the architecture; None: the default's."""
    elsewhere = unsuited(sm)
    if elsewhere is not None:
        return elsewhere
    kinds = sorted({x.dtype.name for x in (q, k, v)})
    if kinds != ["bfloat16"]:
        return f"takes q, k and v in bfloat16, not {', '.join(kinds)}"
    if q.shape[-1] not in WIDTHS:
        return f"needs heads {' or '.join(map(str, WIDTHS))} wide, not {q.shape[-1]}"
    tokens = _tokens(q, k, table)
    if any(count % SLAB for count in tokens):
        return f"needs latent frames of a multiple of {SLAB} tokens, not {max(tokens)}"
    return None


def forward(q: Heads, k: Keys, v: Keys, table: Table, *, units: str) -> tuple[Heads, Sums]:
    """The output, and of every query in its place (`mosaic_lists.places`) the logarithm to the base
    of 2 of its sum of exponentials. That is inf where there is no query, and where a query sees no
    key: weights that are made again from it are zero. units: of `UNITS`.
    """
    if units == "wgmma":
        from longlive_kernels.attention.chunk_table.mosaic_forward import attended

        sizes = TILE, FORWARD.tile
    else:
        from longlive_kernels.attention.chunk_table.mosaic_tcgen05 import attended

        sizes = 2 * TILE, BLACKWELL.tile
    lists = mosaic_lists.over_keys(table, _tokens(q, k, table), *sizes)
    out, sums = tiles.alike(*attended(q, k, v, lists), q)[:2]
    if lists.ragged[0]:
        empty = mosaic_lists.places(table, _tokens(q, k, table)[0]) == q.shape[1]
        sums = jnp.where(jnp.asarray(empty), jnp.float32(jnp.inf), sums)
    return out, sums


def backward(
    table: Table, saved: tuple[Heads, Keys, Keys, Heads, Sums], grad: Heads, *, units: str
) -> tuple[Heads, Keys, Keys]:
    """Of q, k and v. Sums in float32. units: as `forward` takes it."""
    if units == "wgmma":
        from longlive_kernels.attention.chunk_table.mosaic_keys import of_keys
        from longlive_kernels.attention.chunk_table.mosaic_queries import of_queries

        listed_keys, listed_queries = QUERIES.tile, KEYS.tile
    else:
        from longlive_kernels.attention.chunk_table.mosaic_tcgen05_gradient import (
            of_keys,
            of_queries,
        )

        listed_keys = listed_queries = GRADIENT.tile
    q, k, v, out, sums = saved
    tokens = _tokens(q, k, table)
    # What is subtracted from the gradient of a row's weights, for the softmax.
    mean = jnp.einsum("bnad,bnad->ban", grad, out, preferred_element_type=jnp.float32)
    lists = mosaic_lists.over_keys(table, tokens, TILE, listed_keys)
    if lists.ragged[0]:
        order = mosaic_lists.places(table, tokens[0])
        mean = jnp.take(mean, jnp.asarray(order), axis=2, mode="fill", fill_value=0)
    operands = (q, k, v, grad, sums, mean)
    dq = of_queries(*operands, lists)
    lists = mosaic_lists.over_queries(table, tokens, listed_queries, TILE)
    dk, dv = of_keys(*operands, lists)
    return tuple(tiles.alike(dq, dk, dv, q)[:3])


def _tokens(q: Array, k: Array, table: Table) -> tuple[int, int]:
    """Of a frame of queries, and of one of keys."""
    return q.shape[1] // table.shape[0], k.shape[1] // table.shape[1]


_ATTEND = {
    units: vjp.differentiable(*(functools.partial(x, units=units) for x in (forward, backward)))
    for units in set(UNITS.values())
}


def attend(q: Heads, k: Keys, v: Keys, table: Table, *, sm: int | None = None) -> Heads:
    """See `api.chunk_table`. sm: as `unsupported` takes it, which is asked before."""
    return _ATTEND[UNITS[arch.default() if sm is None else sm]](q, k, v, table)
