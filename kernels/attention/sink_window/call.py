"""What is asked of a backend, as a value."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from longlive_kernels.attention.sink_window import kept
from longlive_kernels.attention.sink_window.kept import Fresh, Kept

# What the caller guarantees about `visible`, known when the program is compiled. "prefix": every
# query frame sees the first slots of the table, and no other. "nested": of two query frames of a
# video, one sees all that the other sees. "any": nothing.
Order = Literal["any", "nested", "prefix"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of `api.sink_window`."""

    q: Float[Array, "b n a d"]
    k: Kept
    v: Kept
    visible: Bool[Array, "b f_or_1 slots"]
    layer: Int[Array, ""] | None = None
    read: Float[Array, "b m p"] | None = None
    fresh: Fresh | None = None
    order: Order = dataclasses.field(default="any", metadata=dict(static=True))

    @property
    def rows(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    @property
    def width(self) -> int:
        return self.q.shape[3]

    @property
    def frames(self) -> int:
        """Of queries."""
        return self.q.shape[1] // self.tokens

    @property
    def slots(self) -> int:
        return self.visible.shape[2]

    @property
    def tokens(self) -> int:
        """Of a latent frame."""
        return kept.shape(self.k, self.heads)[-3]

    @property
    def eight(self) -> bool:
        """Whether scores are products of eight-bit numbers."""
        return isinstance(self.k, kept.Scaled) and self.k.multiplied

    def by_frame(self) -> Call:
        """The same call with a row of `visible` for each query frame."""
        rows = (self.rows, self.frames, self.slots)
        return dataclasses.replace(self, visible=jnp.broadcast_to(self.visible, rows))

    def rounded(self, dtype) -> Call:
        """The same scores as products of any numbers: of queries and fresh keys in `dtype` that are
        rounded already. Gradients go through as if they were not.
        """
        if not self.eight:
            return self
        like, heads = dataclasses.replace(self.k, multiplied=False), self.heads

        def through(x: Array) -> Array:
            x = x.astype(dtype)
            return x + jax.lax.stop_gradient(kept.plain(kept.rounded(x, like), heads, dtype) - x)

        fresh = self.fresh and dataclasses.replace(self.fresh, k=through(self.fresh.k))
        return dataclasses.replace(self, q=through(self.q), k=like, fresh=fresh)

    def windows(self, dtype) -> tuple[Array, Array]:
        """Keys and values of the whole layer [b slots s a d] as they are attended."""
        fresh = (self.fresh.k, self.fresh.v) if self.fresh else (None, None)
        slots = self.fresh.slots if self.fresh else None
        k, v = (
            kept.window(x, self.heads, dtype, self.layer, new, slots)
            for x, new in zip((self.k, self.v), fresh, strict=True)
        )
        return k if self.read is None else kept.turned(k, self.read[:, :, None, None]), v

    def check(self) -> Call:
        """Itself. Raises ValueError where shapes do not fit each other."""
        self._check_queries()
        self._check_slots()
        return self

    def _check_queries(self) -> None:
        whole = self.q.shape[1] == self.frames * self.tokens
        if self.visible.shape[0] != self.rows or not whole:
            raise ValueError(
                f"queries {self.q.shape} of frames of {self.tokens} tokens do not fit `visible`"
                f" {self.visible.shape}"
            )
        if self.visible.shape[1] not in (1, self.frames):
            raise ValueError(
                f"`visible` {self.visible.shape} has neither one row nor one for each of"
                f" {self.frames} query frames"
            )
        if self.order not in get_args(Order):
            raise ValueError(f"order {self.order!r}: one of {', '.join(get_args(Order))}")

    def _check_slots(self) -> None:
        one = (self.rows, self.slots, self.tokens, self.heads, self.width)
        for name, x in (("keys", self.k), ("values", self.v)):
            shape = kept.shape(x, self.heads)
            found = shape if self.layer is None else shape[1:]
            if found != one:
                raise ValueError(f"{name} of one layer are {found}, where {one} are attended")
        if kept.kind(self.k) != kept.kind(self.v):
            kinds = f"{kept.kind(self.k)} and {kept.kind(self.v)}"
            raise ValueError(f"keys and values are kept in one way, not as {kinds}")
        if isinstance(self.v, kept.Scaled) and self.v.multiplied:
            raise ValueError("keys alone are multiplied as they are kept, not values")
        if self.eight and self.read is not None:
            raise ValueError("keys that are turned as they are read are not multiplied as kept")
        turned = () if self.read is None else self.read.shape
        if turned and (turned[:2] != one[:2] or 2 * turned[2] > self.width):
            raise ValueError(f"phases {turned} do not turn keys of {one}")
        if self.fresh is not None:
            new = (self.rows, self.fresh.slots.shape[1], *one[2:])
            found = (self.fresh.k.shape, self.fresh.v.shape)
            if self.fresh.slots.shape[0] != self.rows or set(found) != {new}:
                raise ValueError(f"fresh frames {found} are not {new} of one latent frame a slot")
