"""The attention of tokamax (github.com/openxla/tokamax), a Mosaic kernel each for Hopper and
Blackwell; opt-in.

`rows` says what it is handed. Quantised slots are dequantised a layer at a time before it reads
them. Its gradient is its own, which does not compile for Blackwell (tokamax 0.0.12: more shared
memory than there is).
"""

from __future__ import annotations

import importlib.util

from absl import flags
from jaxtyping import Array, Float
from longlive_kernels.attention.sink_window import rows
from longlive_kernels.attention.sink_window.call import Call
from longlive_kernels.attention.tile import unsuited

WIDEST = 256  # head
EIGHT = 8  # tokens that lie together in shared memory
DTYPES = ("bfloat16", "float16")


def unsupported(call: Call, *, sm: int | None = None) -> str | None:
    """Why a call cannot run here; None if it can. sm: the architecture; None: the default's."""
    elsewhere = unsuited(sm)
    if elsewhere is not None:
        return elsewhere
    if call.q.dtype.name not in DTYPES:
        return f"takes queries of one of {DTYPES}, not {call.q.dtype.name}"
    if call.width > WIDEST:
        return f"needs heads at most {WIDEST} wide, not {call.width}"
    if call.tokens % EIGHT:
        return f"needs latent frames of a multiple of {EIGHT} tokens, not {call.tokens}"
    if importlib.util.find_spec("tokamax") is None:
        return "needs tokamax: pip install tokamax"
    return None


def attend(call: Call, *, implementation: str = "mosaic") -> Float[Array, "b n a d"]:
    """See `api.sink_window`. implementation: of tokamax; "xla" runs everywhere."""
    import tokamax

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # it would look for its own among those of the command

    def library(q: Array, k: Array, v: Array, keys: Array) -> Array:
        return tokamax.dot_product_attention(
            q, k, v, key_value_seq_lengths=keys, implementation=implementation
        )

    return rows.attend(call, library)
