"""Attention over slots for Hopper and Blackwell, in Pallas for Mosaic GPU; see mosaic_kernel.py.

Keys and values are read where they lie, out of all layers, by the list of the slots that a query
frame sees. What has fewer bits is unpacked between the copy and the product; only its scales, which
lie apart, are put in order beforehand. Where keys are turned as they are read, queries are instead;
see mosaic_turn.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Float32, Int32
from longlive_kernels import arch
from longlive_kernels.attention.sink_window import kept, xla
from longlive_kernels.attention.sink_window.call import Call
from longlive_kernels.attention.sink_window.kept import Kept, Scaled
from longlive_kernels.attention.sink_window.visits import visits
from longlive_kernels.attention.sink_window.vjp import differentiable
from longlive_kernels.attention.tile import ROWS, UNITS, unsuited
from longlive_kernels.nvfp4.format import BLOCK, NVFP4, RULES

WIDTH = 128  # of a head
HALF = WIDTH // 2
DEPTH = 64  # keys that weights and values are multiplied over at a time
EIGHT = 8  # rows that lie together in shared memory
KINDS = ("bfloat16", "int8", "float8_e4m3fn", "nvfp4")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """keys: of a tile. stages: tiles that are loaded ahead. registers: of a thread that loads, and
    of one that has the softmax.
    """

    registers: tuple[int, int]
    keys: int = 128
    stages: int = 2


# By the units, and whether a thread that loads also unpacks.
BLOCKS = {
    ("wgmma", False): Blocks((40, 232)),
    ("wgmma", True): Blocks((104, 200)),
    ("tcgen05", False): Blocks((24, 232)),
    ("tcgen05", True): Blocks((104, 192)),
}
# Where those that have the softmax turn queries, too.
TURNING = BLOCKS | {("tcgen05", True): Blocks((88, 200))}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for. units: of `UNITS`. kind: how slots are kept. eight: keys are
    multiplied as they are kept. turned: queries are, for each slot. tokens: of a latent frame.
    lists: the length of the list of each source, the table and the fresh frames.
    """

    units: str
    kind: str
    eight: bool
    turned: bool
    tokens: int
    heads: int
    lists: tuple[int, ...]

    @property
    def blocks(self) -> Blocks:
        return (TURNING if self.turned else BLOCKS)[self.units, self.kind != "bfloat16"]

    @property
    def unpacked(self) -> str:
        """Of keys and values, those of the table that are unpacked."""
        if self.kind == "bfloat16":
            return ""
        return "v" if self.eight else "kv"

    @property
    def multiplies(self) -> Any:
        """The type of keys in shared memory, and of what they are multiplied with."""
        return jnp.dtype(self.kind if self.eight else jnp.bfloat16)

    @property
    def halves(self) -> bool:
        """Whether even channels come first, then odd ones, and not one beside the other."""
        return self.kind == "nvfp4"

    @property
    def scales(self) -> int:
        """Of a token of one head."""
        return WIDTH // BLOCK if self.kind == "nvfp4" else 1

    @property
    def parts(self) -> int:
        """Tiles of keys in a slot."""
        return -(-self.tokens // self.blocks.keys)

    @property
    def tail(self) -> int:
        """Keys in the last tile of a slot, if it is not whole."""
        return self.tokens % self.blocks.keys

    def multiplied(self, keys: int) -> int:
        """Keys that are multiplied where a tile has so many."""
        return keys + -keys % DEPTH


def unsupported(call: Call, *, sm: int | None = None) -> str | None:
    """Why a call cannot run here; None if it can. sm: the architecture; None: the default's."""
    elsewhere = unsuited(sm)
    if elsewhere is not None:
        return elsewhere
    if call.q.dtype != jnp.bfloat16:
        return f"takes queries in bfloat16, not {call.q.dtype.name}"
    if kept.kind(call.k) not in KINDS:
        return f"reads slots of {', '.join(KINDS)}, not {kept.kind(call.k)}"
    if call.width != WIDTH:
        return f"needs heads {WIDTH} wide, not {call.width}"
    if call.tokens % EIGHT:
        return f"needs latent frames of a multiple of {EIGHT} tokens, not {call.tokens}"
    if call.eight and _units(sm) != "wgmma":
        return "multiplies keys in eight bits on sm_90 alone"
    if call.read is not None and 2 * call.read.shape[2] > HALF:
        return f"turns keys by {HALF // 2} phases of a slot at most, not {call.read.shape[2]}"
    return None


def attend(call: Call, *, sm: int | None = None) -> Float[Array, "b n a d"]:
    """See `api.sink_window`; its gradient is that of `xla`. sm: as `unsupported` takes it, which is
    asked before.
    """
    return differentiable(functools.partial(_forward, units=_units(sm)), xla.attend)(call)


def _forward(call: Call, *, units: str) -> Float[Array, "b n a d"]:
    call = call.by_frame()
    kind, fresh = kept.kind(call.k), call.fresh
    stored, own = (call.visible, None) if fresh is None else kept.divided(call.visible, fresh)
    seen = [stored] if own is None else [stored, own]
    lengths = tuple(mask.shape[2] for mask in seen)
    turned = call.read is not None
    plan = Plan(units, kind, call.eight, turned, call.tokens, call.heads, lengths)

    def beside(x: Float[Array, "*n d"]) -> Kept:
        """Queries and fresh keys as they are multiplied."""
        return kept.rounded(x, call.k) if call.eight else ordered(x, kind)

    q = call.q.reshape(call.rows, call.frames, call.tokens, *call.q.shape[2:])
    sources = [tuple(operands(x, call.layer, plan) for x in (call.k, call.v))]
    if fresh is not None:
        k, v = (x.astype(call.q.dtype) for x in (fresh.k, fresh.v))
        sources.append(tuple(operands(x, None, plan) for x in (beside(k), ordered(v, kind))))
    asked = operands(beside(q), None, plan)
    turning = (pairs(asked[0], plan), turns(call, plan)) if turned else None
    out = _kernel(units)(asked, lists(call, seen), sources, plan, turning)
    return merged(out.reshape(call.q.shape), kind)


def _units(sm: int | None) -> str:
    return UNITS[arch.default() if sm is None else sm]


def _kernel(units: str) -> Callable[..., Array]:
    """A `mosaic_kernel.Kernel`."""
    if units == "wgmma":
        from longlive_kernels.attention.sink_window.mosaic_wgmma import KERNEL
    else:
        from longlive_kernels.attention.sink_window.mosaic_tcgen05 import KERNEL
    return KERNEL


def lists(call: Call, seen: list[Bool[Array, "b f _"]]) -> Int32[Array, "bf columns"]:
    """Of each query frame: where its layer begins, how many it sees of each source, and which."""
    index, count = zip(*map(visits, seen), strict=True)
    row = jnp.arange(call.rows, dtype=jnp.int32)[:, None, None]
    index = [row * x.shape[2] + x for x in index]
    layer = jnp.int32(0) if call.layer is None else call.layer.astype(jnp.int32)
    first = jnp.broadcast_to(layer * (call.rows * call.slots), count[0].shape)
    columns = jnp.concatenate([jnp.stack([first, *count], 2), *index], 2)
    return columns.reshape(call.rows * call.frames, -1)


def operands(x: Kept, layer: Array | None, plan: Plan) -> tuple[Array, ...]:
    """The slots of all layers, heads side by side; and the scales of one layer's, if any."""
    lead = 2 if layer is None else 3
    if isinstance(x, NVFP4):
        packed = x.packed.reshape(*x.packed.shape[:lead], plan.tokens, plan.heads, -1)
        return frames(packed, lead), scales(x, layer, plan)
    if isinstance(x, Scaled):
        # What is unpacked comes as bytes.
        bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint8)
        return frames(x.values if x.multiplied else bits(x.values), lead), scales(x, layer, plan)
    return (frames(x, lead),)


def frames(x: Array, lead: int) -> Array:
    """*l b slots s a d → slots of all layers and rows, s, a · d: the same bytes."""
    return x.reshape(math.prod(x.shape[:lead]), x.shape[lead], -1)


def scales(x: Scaled | NVFP4, layer: Array | None, plan: Plan) -> Float32[Array, "m a blocks s"]:
    """Of the layer's slots, those of one head's tokens side by side, filled up to whole tiles. Of
    NVFP4 they have in them what the chunk is scaled by, for twice the values.
    """
    x = kept.of_layer(x, layer)
    if isinstance(x, NVFP4):
        unit = RULES[x.rule].unit(x.amax) * jnp.float32(0.5)
        each = x.scales.astype(jnp.float32) * unit[..., None, None]
    else:
        each = x.scales
    each = each.reshape(-1, plan.tokens, plan.heads, plan.scales)
    filled = ((0, 0), (0, 0), (0, 0), (0, plan.parts * plan.blocks.keys - plan.tokens))
    return jnp.pad(rearrange(each, "m s a e -> m a e s"), filled)


def pairs(q: Float[Array, "bf s ad"], plan: Plan) -> Float[Array, "bf rows ad"]:
    """Of each head the channels that are turned and, in the order of these, what they are turned
    towards: the others of their pairs, once with another sign. Of halves that is what they are.
    """
    if plan.units == "tcgen05":  # which does not ask where a frame ends
        q = jnp.pad(q, ((0, 0), (0, -q.shape[1] % (2 * ROWS)), (0, 0)))
    if plan.halves:
        return q
    q = rearrange(q, "m s (a d two) -> m s a d two", a=plan.heads, two=2)[..., : HALF // 2, :]
    even, odd = q[..., 0], q[..., 1]
    both = jnp.stack([jnp.stack([even, odd], -1), jnp.stack([odd, -even], -1)], 3)
    return both.reshape(*q.shape[:2], -1)  # m s (a 2 d two)


def turns(call: Call, plan: Plan) -> Float32[Array, "m 2 c"]:
    """Cosine and sine of each slot for those channels: of the table's, then of the fresh ones."""
    phases = [call.read]
    if call.fresh is not None:
        inside = jnp.minimum(call.fresh.slots, call.slots - 1)
        phases.append(jnp.take_along_axis(call.read, inside[..., None], 1))
    angle = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in phases]).astype(jnp.float32)
    angle = angle if plan.halves else jnp.repeat(angle, 2, 1)
    angle = jnp.pad(angle, ((0, 0), (0, HALF - angle.shape[1])))
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)


def ordered(x: Float[Array, "*n d"], kind: str) -> Float[Array, "*n d"]:
    """Of NVFP4 the even channels, then the odd ones: what is unpacked from low nibbles and from
    high ones is then side by side.
    """
    return rearrange(x, "... (d two) -> ... (two d)", two=2) if kind == "nvfp4" else x


def merged(x: Float[Array, "*n d"], kind: str) -> Float[Array, "*n d"]:
    """Undoes `ordered`."""
    return rearrange(x, "... (two d) -> ... (d two)", two=2) if kind == "nvfp4" else x
