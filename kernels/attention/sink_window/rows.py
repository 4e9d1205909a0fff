"""Turns a call into calls of a library's attention.

Libraries attend keys that lie side by side, of which each row of the batch sees the first so many.
Where the visible slots are the first ones of the table (`order="prefix"`, every chunk of a stream),
a layer's slots are handed over as they lie. Where they are nested (a recache), the slots are copied
once, those that most query frames see first, and every frame sees a number of them. Otherwise they
are copied for every query frame. Query frames that see different numbers of slots follow one
another in a loop of known length; nothing asks the host.

A mask would need no copies, but libraries multiply what it hides, and leave out what lies behind a
row's length.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32
from longlive_kernels.attention.sink_window.call import Call

# q [b n a d], k and v [b m a d], how many of its m keys each row sees [b] → [b n a d].
Library = Callable[[Array, Array, Array, Array], Array]


def attend(call: Call, library: Library) -> Float[Array, "b n a d"]:
    """Attends the slots of a call by a library; see `api.sink_window`.

    Args:
      call: What is attended. Slots in fewer bits are dequantised, and keys that are rotated as they
        are read are rotated, one layer at a time.
      library: Attention of rows with a length each.

    Returns:
      The output [b n a d], zeros for query frames that see no slot.
    """
    call = call.rounded(call.q.dtype)
    k, v = call.windows(call.q.dtype)
    if call.order == "nested":
        k, v = _reordered(call.visible, k, v)

    def of_rows(q: Float[Array, "b n a d"], seen: Bool[Array, "b slots"]) -> Array:
        keys, values = (k, v) if call.order != "any" else _reordered(seen[:, None], k, v)
        count: Int32[Array, " b"] = seen.sum(1, dtype=jnp.int32) * call.tokens
        keys, values = (rearrange(x, "b c s a d -> b (c s) a d") for x in (keys, values))
        # No library is asked for the softmax of nothing.
        out = library(q, keys, values, jnp.maximum(count, 1))
        return jnp.where((count > 0)[:, None, None, None], out, jnp.zeros((), out.dtype))

    groups = call.visible.shape[1]
    if groups == 1:
        return of_rows(call.q, call.visible[:, 0])
    q = rearrange(call.q, "b (g n) a d -> g b n a d", g=groups)
    seen = rearrange(call.visible, "b g c -> g b c")
    out = lax.map(lambda group: of_rows(*group), (q, seen))
    return rearrange(out, "g b n a d -> b (g n) a d")


def _reordered(
    visible: Bool[Array, "b g slots"], *slots: Float[Array, "b slots s a d"]
) -> tuple[Float[Array, "b slots s a d"], ...]:
    """The slots of each row, those that most of its query frames see first."""
    index = _most_seen_first(visible)
    rows = jnp.arange(index.shape[0], dtype=jnp.int32)[:, None]
    return tuple(x.at[rows, index].get(mode="promise_in_bounds") for x in slots)


def _most_seen_first(visible: Bool[Array, "b g slots"]) -> Int[Array, "b slots"]:
    """The slots in falling order of how many query frames see them; the first of equals first.

    By comparisons: to sort so few would cost GPUs a program of its own.
    """
    views = visible.sum(1, dtype=jnp.int32)
    number = jnp.arange(visible.shape[2], dtype=jnp.int32)
    more = views[:, None, :] > views[:, :, None]
    earlier = (views[:, None, :] == views[:, :, None]) & (number < number[:, None])
    place = (more | earlier).sum(2, dtype=jnp.int32)  # of each slot
    here = place[:, None, :] == number[:, None]  # b place slot
    return jnp.where(here, number, 0).sum(2, dtype=jnp.int32)
