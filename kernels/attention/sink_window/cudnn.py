"""cuDNN's attention, through `jax.nn.dot_product_attention`; what it is given is made by rows.py.

For comparison: slots are unpacked and copied before it reads them.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float
from longlive_kernels import arch
from longlive_kernels.attention.sink_window import rows
from longlive_kernels.attention.sink_window.call import Call

FIRST = 80  # the architecture of the first GPUs that it is for
HOPPER = 90
DTYPES = ("bfloat16", "float16")


def unsupported(call: Call, *, sm: int | None = None) -> str | None:
    """Why a call cannot run here; None if it can. sm: the architecture; None: the default's.

    As `check_is_flash_attention` of jax._src.cudnn.fused_attention_stablehlo.
    """
    sm = arch.default() if sm is None else sm
    if sm is None:
        return "needs an NVIDIA GPU"
    if sm < FIRST:
        return f"is for sm_{FIRST} and later, not sm_{sm}"
    if call.q.dtype.name not in DTYPES:
        return f"takes queries of one of {DTYPES}, not {call.q.dtype.name}"
    widest = 256 if sm >= HOPPER else 128
    if call.width % 8 or call.width > widest:
        return f"needs heads at most {widest} wide and of a multiple of 8, not {call.width}"
    return None


def attend(call: Call, *, implementation: str = "cudnn") -> Float[Array, "b n a d"]:
    """See `api.sink_window`. implementation: of JAX's function; "xla" runs everywhere."""

    def library(q: Array, k: Array, v: Array, keys: Array) -> Array:
        return jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=keys, implementation=implementation
        )

    return rows.attend(call, library)
