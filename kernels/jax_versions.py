"""What differs between the versions of JAX that our Mosaic GPU kernels run on, 0.10.2 to 0.12.

No other module of the package branches on a version of JAX, or calls what one of them lacks or
deprecates: it calls the functions below. Importing Mosaic takes long, so only kernels, which
are imported when they are first called, import this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
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
