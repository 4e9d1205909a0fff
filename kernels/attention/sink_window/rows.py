"""A call as libraries of attention take it: rows of queries, whose keys lie side by side, and of
which each sees the first so many.

Slots are copied, those that are seen first: the window, once for each row of the batch where all
its query frames see the same, else once for each query frame (11 GB for a recache of 5B). A mask
would need no copies, but libraries multiply what it hides, and leave out what lies behind a row's
length.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32
from longlive_kernels.attention.sink_window.call import Call
from longlive_kernels.attention.sink_window.visits import visits

# q [r n a d], k and v [r m a d], how many of its m keys each row sees [r] → [r n a d].
Library = Callable[[Array, Array, Array, Array], Array]


def attend(call: Call, library: Library) -> Float[Array, "b n a d"]:
    """See `api.sink_window`. What all frames of a chunk see is known only as the program runs."""
    call = call.rounded(call.q.dtype)
    k, v = call.windows(call.q.dtype)

    def grouped(seen: Bool[Array, "b g slots"]) -> Float[Array, "b n a d"]:
        return _grouped(call.q, k, v, seen, library)

    one = call.visible[:, :1]
    if call.frames == 1:
        return grouped(one)
    alike = (call.visible == one).all()
    return lax.cond(alike, lambda: grouped(one), lambda: grouped(call.visible))


def _grouped(
    q: Float[Array, "b n a d"],
    k: Float[Array, "b slots s a d"],
    v: Float[Array, "b slots s a d"],
    seen: Bool[Array, "b g slots"],
    library: Library,
) -> Float[Array, "b n a d"]:
    """In g groups of a row's queries: each of them is a row to the library."""
    index, count = visits(seen)
    batch, heads = jnp.arange(q.shape[0])[:, None, None], q.shape[2:]

    def ordered(x: Float[Array, "b slots s a d"]) -> Float[Array, "bg m a d"]:
        return x[batch, index].reshape(count.size, -1, *heads)

    keys: Int32[Array, " bg"] = count.reshape(-1) * k.shape[2]
    # No library is asked for the softmax of nothing.
    asked = q.reshape(count.size, -1, *heads), ordered(k), ordered(v), jnp.maximum(keys, 1)
    out = library(*asked)
    some = (keys > 0)[:, None, None, None]
    return jnp.where(some, out, jnp.zeros((), out.dtype)).reshape(q.shape)
