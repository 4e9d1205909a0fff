"""The functions that users call. A backend has both, and says of either operand what it lacks."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float
from longlive_kernels.nvfp4.format import NVFP4
from longlive_kernels.nvfp4.matmul import cudnn, mosaic, reference, triton, wgmma, xla

# The best first; but before what has not run on a device comes what runs on every one.
BACKENDS = {
    "xla": xla,
    "reference": reference,
    "cudnn": cudnn,
    "mosaic": mosaic,
    "triton": triton,
    "wgmma": wgmma,
}


def matmul(
    a: NVFP4, b: NVFP4, *, dtype=jnp.bfloat16, implementation: str | None = None
) -> Float[Array, "*s m n"]:
    """a bᵀ of quantised [*s m k] and [*s n k]: sums are float32, the result is `dtype`.

    Unless FP4 units are asked for by name it is emulated (`xla.py`): operands are unpacked.

    implementation: a name in `BACKENDS`; None picks the best that supports the call.

    Raises ValueError where shapes do not fit, NotImplementedError where the named backend cannot
    run the call.
    """
    if a.shape[-1] != b.shape[-1] or a.shape[:-2] != b.shape[:-2]:
        raise ValueError(f"no product of {a.shape} and {b.shape} transposed")
    return _backend(implementation, a, b, dtype).matmul(a, b, dtype)


def matmul_w4a16(
    x: Float[Array, "*s m k"], w: NVFP4, *, dtype=None, implementation: str | None = None
) -> Float[Array, "*s m n"]:
    """x wᵀ of numbers as they are and quantised weights [n k]: sums are float32, the result is
    `dtype`, which is that of x unless given. Weights are unpacked to the type of x: exactly where
    that has 16 bits (`xla.py`), else to float32 (`reference.py`). Otherwise as `matmul`.
    """
    if w.ndim != 2 or x.shape[-1] != w.shape[-1]:
        raise ValueError(f"no product of {x.shape} and {w.shape} transposed")
    dtype = x.dtype if dtype is None else dtype
    return _backend(implementation, x, w, dtype).matmul_w4a16(x, w, dtype)


def _backend(name: str | None, a: NVFP4 | Array, b: NVFP4, dtype):
    if name is None:
        return next(x for x in BACKENDS.values() if x.unsupported(a, b, dtype) is None)
    if name not in BACKENDS:
        raise NotImplementedError(f"no backend {name!r}: there are {', '.join(BACKENDS)}")
    reason = BACKENDS[name].unsupported(a, b, dtype)
    if reason is not None:
        raise NotImplementedError(f"{name} {reason}")
    return BACKENDS[name]
