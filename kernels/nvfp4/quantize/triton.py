"""Values and scales in one pass, in Triton: x is read once, and nothing else is written."""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int
from longlive_kernels import arch
from longlive_kernels.nvfp4.format import BLOCK, NVFP4, RULES
from longlive_kernels.nvfp4.quantize.hadamard import oriented


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What one program quantises: rows, of 16 numbers each so many blocks."""

    rows: int = 16
    blocks: int = 8
    warps: int = 4


BLOCKS = Blocks()
FIRST = 89  # that converts to e4m3
TYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def unsupported(x: Array, *, sm: int | None = None, **options) -> str | None:
    """Why a call cannot run here; None if it can. sm: the architecture; None: the default's."""
    sm = arch.default() if sm is None else sm
    if sm is None:
        return "needs an NVIDIA GPU"
    if sm < FIRST:
        return f"needs a GPU that converts to e4m3 (sm_{FIRST} or later), not sm_{sm}"
    if x.dtype not in TYPES:
        return f"quantises {', '.join(jnp.dtype(t).name for t in TYPES)}, not {x.dtype}"
    if importlib.util.find_spec("jax_triton") is None:
        return "needs jax_triton"
    return None


def quantize(
    x: Float[Array, "*s r c"],
    *,
    rule: str,
    tile: int,
    transpose: bool,
    signs: Float[Array, " 16"] | None,
    draws: Float32[Array, "k *s r2 c2"] | None,
    amax: Float32[Array, "*s"],
    seed: Int[Array, ""] | None = None,
    sm: int | None = None,
) -> NVFP4:
    """As reference.py. Transposing and rotating are steps before it, each with its own pass.

    seed: of stochastic rounding with numbers that are drawn where they are used (Philox) in place
    of `draws`, which are eight bytes for a number of x: the bytes are then not the reference's, but
    have its statistics. sm: the architecture; None: the default's.

    Raises ValueError for a seed beside draws.
    """
    from longlive_kernels import jax_versions
    from longlive_kernels.nvfp4.quantize.fused import quantized

    if seed is not None and draws is not None:
        raise ValueError("stochastic rounding takes draws or a seed, not both")
    x = oriented(x, transpose, signs)
    *stack, rows, columns = x.shape
    chosen, blocks = RULES[rule], columns // BLOCK
    noise = {"draws": draws, "seed": None if seed is None else seed.reshape(1)}
    kind = next((name for name, given in noise.items() if given is not None), "none")
    packed, scales = jax_versions.triton_call(
        x,
        amax.reshape(-1),
        amax.reshape(-1) if kind == "none" else noise[kind],
        kernel=quantized,
        out_type=(
            jax.ShapeDtypeStruct((*stack, rows, columns // 2), jnp.uint8),
            jax.ShapeDtypeStruct((*stack, rows, blocks), jnp.float8_e4m3fn),
        ),
        grid=(-(-rows // BLOCKS.rows), -(-blocks // BLOCKS.blocks), math.prod(stack)),
        num_warps=BLOCKS.warps,
        compute_capability=arch.default() if sm is None else sm,
        enable_fp_fusion=False,
        R=rows,
        C=blocks,
        TILE=tile,
        RULE="static" if chosen.error is None else rule,
        VALUE=float(chosen.largest_value),
        SCALE=float(chosen.largest_scale),
        NOISE=kind,
        ROWS=BLOCKS.rows,
        BLOCKS=BLOCKS.blocks,
    )
    return NVFP4(packed, scales, amax, rule)
