"""cuDNN's attention, through `jax.nn.dot_product_attention`: the default on NVIDIA GPUs.

`rows` says what it is handed. Quantised slots are dequantised a layer at a time before it reads
them.
"""

from __future__ import annotations

import functools

from jaxtyping import Array, Float
from longlive_kernels.attention import cudnn as library
from longlive_kernels.attention.sink_window import rows
from longlive_kernels.attention.sink_window.call import Call


def unsupported(call: Call, *, sm: int | None = None) -> str | None:
    """Why a call cannot run here; None if it can. sm: the architecture; None: the default's."""
    return library.unsupported(call.q, sm=sm)


def attend(call: Call, *, implementation: str = "cudnn") -> Float[Array, "b n a d"]:
    """See `api.sink_window`. implementation: of JAX's function; "xla" runs everywhere."""
    return rows.attend(call, functools.partial(library.attend, implementation=implementation))
