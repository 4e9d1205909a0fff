"""cuDNN's attention through `jax.nn.dot_product_attention`, for both ops: calls that it takes."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int
from longlive_kernels import arch

FIRST = 80  # the architecture of the first GPUs that it is for
HOPPER = 90
DTYPES = ("bfloat16", "float16")


def unsupported(q: Float[Array, "b n a d"], *, sm: int | None = None) -> str | None:
    """Says why cuDNN cannot attend queries like these; None if it can.

    The limits are those of `check_is_flash_attention` of
    jax._src.cudnn.fused_attention_stablehlo. sm: the architecture; None: the default device's.
    """
    sm = arch.default() if sm is None else sm
    if sm is None:
        return "needs an NVIDIA GPU"
    if sm < FIRST:
        return f"is for sm_{FIRST} and later, not sm_{sm}"
    if q.dtype.name not in DTYPES:
        return f"takes queries of one of {DTYPES}, not {q.dtype.name}"
    widest = 256 if sm >= HOPPER else 128
    width = q.shape[3]
    if width % 8 or width > widest:
        return f"needs heads at most {widest} wide and of a multiple of 8, not {width}"
    return None


def attend(
    q: Float[Array, "b n a d"],
    k: Float[Array, "b m a d"],
    v: Float[Array, "b m a d"],
    lengths: Int[Array, " b"] | None = None,
    *,
    implementation: str = "cudnn",
) -> Float[Array, "b n a d"]:
    """Attends the first `lengths` keys of each row, all of them where it is None.

    implementation: of JAX's function; "xla" means the same and runs everywhere.
    """
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation=implementation
    )
