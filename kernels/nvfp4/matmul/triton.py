"""Triton's block-scaled product, `tl.dot_scaled`, for Blackwell."""

from __future__ import annotations

import dataclasses
import importlib.util

import jax
from jaxtyping import Array, Float
from longlive_kernels import arch
from longlive_kernels.nvfp4.format import NVFP4, RULES


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What one program computes. depth: of k, in one step. band: see `dot_scaled.py:product`."""

    rows: int = 128
    columns: int = 128
    depth: int = 256
    band: int = 8
    warps: int = 8
    stages: int = 3


BLOCKS = Blocks()


def unsupported(a: NVFP4 | Array, b: NVFP4, dtype, *, sm: int | None = None) -> str | None:
    """Why a call cannot run here; None if it can. sm: the architecture; None: the default's."""
    if not isinstance(a, NVFP4):
        return "multiplies two quantised matrices"
    lacking = arch.lacks_fp4(arch.default() if sm is None else sm)
    if lacking is not None:
        return lacking
    if a.ndim != 2:
        return f"multiplies two matrices, not stacks of them: {a.shape}"
    if a.shape[-1] % BLOCKS.depth:
        return f"needs k in multiples of {BLOCKS.depth}, not {a.shape[-1]}"
    if importlib.util.find_spec("jax_triton") is None:
        return "needs jax_triton"
    return None


def matmul(a: NVFP4, b: NVFP4, dtype, *, sm: int | None = None) -> Float[Array, "m n"]:
    """a bᵀ, scaled before it is rounded to `dtype`. sm: the architecture; None: the default's."""
    from longlive_kernels import jax_versions
    from longlive_kernels.nvfp4.matmul.dot_scaled import product

    (m, k), n = a.shape, b.shape[0]
    unit = RULES[a.rule].unit(a.amax) * RULES[b.rule].unit(b.amax)
    return jax_versions.triton_call(
        a.packed,
        b.packed,
        a.scales,
        b.scales,
        unit.reshape(1),
        kernel=product,
        out_type=jax.ShapeDtypeStruct((m, n), dtype),
        grid=(-(-m // BLOCKS.rows) * -(-n // BLOCKS.columns),),
        num_warps=BLOCKS.warps,
        num_stages=BLOCKS.stages,
        enable_fp_fusion=True,
        compute_capability=arch.default() if sm is None else sm,
        M=m,
        N=n,
        K=k,
        ROWS=BLOCKS.rows,
        COLUMNS=BLOCKS.columns,
        DEPTH=BLOCKS.depth,
        BAND=BLOCKS.band,
    )
