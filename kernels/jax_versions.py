"""What differs between the versions of JAX that our kernels for GPUs run on, 0.10.2 to 0.12.

No other module of the package branches on a version of JAX, or calls what one of them lacks or
deprecates: it calls the functions below. Importing Mosaic takes long, so only kernels, which
are imported when they are first called, import this module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters import partial_eval
from jaxtyping import Array

Ref = Any  # of Mosaic, to arrays or parts of them

LOAD_TAKES_AN_INDEX = jax.__version_info__ < (0, 11)


def load(ref: Ref, *, layout: Any = None, optimized: bool = True) -> Array:
    """Load all of a reference into registers, as `plgpu.load` does.

    Its second argument, an index, is required by jax 0.10, deprecated in 0.11 and gone in 0.12.

    Args:
      ref: a reference to shared or global memory, or to a part of it.
      layout: of the result in registers; None leaves it to the compiler.
      optimized: whether a load that is not optimised for the layout is an error.

    Returns:
      The array, of the reference's shape and type.
    """
    index = ((),) if LOAD_TAKES_AN_INDEX else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def transposed(ref: Ref) -> Ref:
    """Return a reference [m n] as one [n m]; `plgpu.transpose_ref` is deprecated since 0.11.2."""
    return ref.transpose((1, 0))


def for_each_warp(axis: str) -> Callable[[Callable[[], None]], None]:
    """Run the decorated function once for each warp of a warpgroup, where it is defined.

    `pl.core_map` is deprecated since 0.11.2, and `pl.kernel` takes the same mesh in all versions.

    Args:
      axis: the name by which `lax.axis_index` returns the number of the warp.
    """

    def run(body: Callable[[], None]) -> None:
        pl.kernel(body, out_type=(), mesh=plgpu.WarpMesh(axis_name=axis))()

    return run


def compiler_params(**options: Any) -> plgpu.CompilerParams:
    """Return the options that a kernel is compiled with, its lowering semantics pinned to Lane.

    Since jax 0.11 the default is Warpgroup. Registers, spills and shared memory in README.md were
    measured with Lane, and the layouts of `chunk_table` cannot be inferred with Warpgroup.
    """
    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, **options)


def triton_call(*arrays: Array, out_type: Any, enable_fp_fusion: bool, **options: Any) -> Any:
    """Call a Triton kernel, as `jax_triton.triton_call` does.

    jax-triton 0.4 has `out_type` where 0.3 has `out_shape`, and passes options of Triton's compiler
    on as a dictionary.

    Args:
      arrays: that the kernel reads.
      out_type: shapes and types of what it writes.
      enable_fp_fusion: whether the compiler may fuse products and sums. Triton 3.10 changes its
        default.
      options: see `jax_triton.triton_call`.

    Returns:
      Arrays as in `out_type`.
    """
    import jax_triton  # an extra

    if "backend_options" in inspect.signature(jax_triton.triton_call).parameters:
        options["out_type"] = out_type
        options["backend_options"] = {"enable_fp_fusion": enable_fp_fusion}
        _accept_live_inputs(jax_triton.triton_lib.triton_kernel_call_p)
    else:
        options["out_shape"] = out_type
        options["enable_fp_fusion"] = enable_fp_fusion
    return jax_triton.triton_call(*arrays, **options)


def _accept_live_inputs(primitive: Any) -> None:
    """Let the rule of a primitive for dead code take what jax 0.12 calls it with.

    That is one argument more, the live inputs, than the rule of jax-triton 0.4.1 takes, so that no
    program with a Triton kernel can be traced by them together.
    """
    rule = partial_eval.dce_rules[primitive]
    if jax.__version_info__ < (0, 12) or len(inspect.signature(rule).parameters) == 3:
        return

    def with_live_inputs(used: list[bool], live: list[bool], equation: Any) -> Any:
        return rule(used, equation)

    partial_eval.dce_rules[primitive] = with_live_inputs
