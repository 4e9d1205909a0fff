"""Named shapes from the models. Tests and benchmarks read this list."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool
from longlive_kernels.attention.sink_window.call import Order

KINDS = ("bfloat16", "int8", "fp8", "nvfp4")  # ways to keep a slot


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call. visible: what a query frame (row) sees of the slots, for each row of the batch.
    own: the slots of the query frames, fresh where slots have fewer bits. relative: keys are turned
    in time as they are read.
    """

    visible: tuple[tuple[tuple[bool, ...], ...], ...]  # b f slots
    own: tuple[int, ...]
    heads: int
    width: int
    tokens: int
    layers: int = 2
    relative: bool = False

    @property
    def table(self) -> Bool[np.ndarray, "b f slots"]:
        return np.array(self.visible, bool)

    @property
    def asked(self) -> Bool[np.ndarray, "b f_or_1 slots"]:
        """The table as models hand it over: one row where all query frames see the same."""
        table = self.table
        return table[:, :1] if (table == table[:, :1]).all() else table

    @property
    def order(self) -> Order:
        """What models promise about such a table (`call.Order`): of a recache no more than that it
        is nested, as its slots may lie in any order.
        """
        table = self.table
        if len(self.asked[0]) == 1 and (table[..., :-1] >= table[..., 1:]).all():
            return "prefix"
        common = (table[:, :, None] & table[:, None]).sum(-1)  # b f f
        count = table.sum(-1)
        smaller = np.minimum(count[:, :, None], count[:, None])
        return "nested" if (common == smaller).all() else "any"

    @property
    def queries(self) -> tuple[int, int, int, int]:
        rows, frames, _ = self.table.shape
        return (rows, frames * self.tokens, self.heads, self.width)  # b n a d

    @property
    def keys(self) -> tuple[int, int, int, int, int, int]:
        rows, _, slots = self.table.shape
        return (self.layers, rows, slots, self.tokens, self.heads, self.width)  # l b slots s a d

    @property
    def turned(self) -> int:
        """Pairs of channels that turn with time; rows and columns have a third each of all."""
        pairs = self.width // 2
        return pairs - 2 * (pairs // 3)

    @property
    def pairs(self) -> int:
        """Pairs of a query frame and a slot that it sees."""
        return int(self.table.sum())

    @property
    def flops(self) -> int:
        """Of both products."""
        return 4 * self.pairs * self.tokens**2 * self.heads * self.width


def tupled(visible: Bool[np.ndarray, "b f slots"]) -> tuple[tuple[tuple[bool, ...], ...], ...]:
    """A table as `Shape` holds it."""
    return tuple(tuple(tuple(map(bool, row)) for row in rows) for rows in visible)


def _shape(visible: np.ndarray, own: range, model: dict[str, int], **more) -> Shape:
    return Shape(tupled(visible), tuple(own), **model, **more)


def filled(frames: int, slots: int, held: int) -> Bool[np.ndarray, "1 f slots"]:
    """A chunk that sees the first `held` slots."""
    return np.broadcast_to(np.arange(slots) < held, (1, frames, slots))


def scattered(frames: int, slots: int, *held: tuple[int, ...]) -> Bool[np.ndarray, "b f slots"]:
    """Rows of which each sees other slots."""
    return np.stack(
        [np.broadcast_to(np.isin(np.arange(slots), each), (frames, slots)) for each in held]
    )


def causal(frames: int, chunk: int) -> Bool[np.ndarray, "1 f slots"]:
    """Every frame is asked, and sees its chunk and those before it."""
    number = np.arange(frames) // chunk
    return (number[None, :] <= number[:, None])[None]


TINY = dict(heads=8, width=32, tokens=16)
WAN_1_3B = dict(heads=12, width=128, tokens=30 * 52)
WAN_5B = dict(heads=24, width=128, tokens=22 * 40)

# A chunk over a full window, over one that fills, and the first of all.
CHUNKS = {
    "tiny_chunk": _shape(filled(3, 12, 12), range(9, 12), TINY),
    "1.3b_chunk": _shape(filled(3, 12, 12), range(9, 12), WAN_1_3B),
    "1.3b_second": _shape(filled(3, 12, 6), range(3, 6), WAN_1_3B),
    "5b_chunk": _shape(filled(8, 32, 32), range(24, 32), WAN_5B),
    "5b_first": _shape(filled(8, 32, 8), range(8), WAN_5B),
    # Rows of guidance: the conditional ones, then the others.
    "5b_guidance": _shape(np.repeat(filled(8, 32, 24), 2, 0), range(16, 24), WAN_5B),
    "1.3b_relative": _shape(filled(3, 12, 12), range(9, 12), WAN_1_3B, relative=True),
}

# A window that is read again under a new prompt.
RECACHES = {
    "tiny_recache": _shape(causal(12, 3), range(12), TINY),
    "1.3b_recache": _shape(causal(12, 3), range(12), WAN_1_3B),
    "5b_recache": _shape(causal(32, 8), range(32), WAN_5B),
}

AWKWARD = {
    "one_slot": _shape(filled(1, 1, 1), range(1), TINY),
    "one_token": _shape(filled(1, 1, 1), range(1), dict(heads=1, width=32, tokens=1)),
    "all_but_one_empty": _shape(scattered(2, 9, (5,)), range(7, 9), TINY),
    "image_first": _shape(filled(1, 12, 1), range(1), TINY),
    "ragged": _shape(filled(2, 5, 4), range(2, 4), dict(heads=2, width=64, tokens=11)),
    # Sinks in front, a hole where the oldest frames were, the chunk in it.
    "sinks": _shape(scattered(2, 10, (0, 1, 2, 4, 5, 8)), range(4, 6), TINY),
    "rows_differ": _shape(scattered(2, 8, (0, 1), (3,), (), (0, 2, 4, 6)), range(2), TINY),
    "nobody_sees": _shape(scattered(2, 6, ()), range(2), TINY),
    "frames_differ": _shape(causal(5, 1) & (np.arange(5) > 1), range(5), TINY),
    "relative": _shape(scattered(2, 8, (0, 3, 4), (1, 4), ()), range(3, 5), TINY, relative=True),
    "one_layer": _shape(filled(3, 6, 5), range(2, 5), TINY, layers=1),
}

SHAPES = CHUNKS | RECACHES | AWKWARD
