"""Named shapes from the models. Tests and benchmarks read this list.

The tables are made here once more, in few lines, because kernels import nothing of the library;
tests hold them against its own.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from longlive_kernels.attention.chunk_table.table import Table


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call. rows, columns: tokens of a latent frame."""

    table: Table
    heads: int
    width: int
    rows: int
    columns: int
    batch: int = 1

    @property
    def tokens(self) -> int:
        """Of one latent frame."""
        return self.rows * self.columns

    @property
    def queries(self) -> tuple[int, int, int, int]:
        return (self.batch, self.table.shape[0] * self.tokens, self.heads, self.width)  # b n a d

    @property
    def keys(self) -> tuple[int, int, int, int]:
        return (self.batch, self.table.shape[1] * self.tokens, self.heads, self.width)  # b m a d


def chunks(frames: int, chunk: int, *, first: int | None = None) -> np.ndarray:
    """The chunk of every latent frame; `first` is the length of the first one where it differs."""
    first = chunk if first is None else first
    return (np.arange(frames) - first) // chunk + 1


def causal(chunk: np.ndarray) -> np.ndarray:
    return chunk[None, :] <= chunk[:, None]


def teacher_forcing(chunk: np.ndarray, *, ranks: int = 1) -> np.ndarray:
    """Over [clean; noisy], or over [clean of rank 0, noisy of rank 0, clean of rank 1, …]."""
    before, own = chunk[None, :] < chunk[:, None], chunk[None, :] == chunk[:, None]
    table = np.block([[before | own, np.zeros_like(own)], [before, own]])
    order = np.arange(len(table)).reshape(2, ranks, -1).swapaxes(0, 1).ravel()
    return table[np.ix_(order, order)]


def windowed(chunk: np.ndarray, window: int, sink: int) -> np.ndarray:
    """Causal, over the last `window` frames, the first `sink` of which are the first of the video
    once the window has left those.
    """
    frame = np.arange(len(chunk))
    end = np.array([frame[chunk == c].max() + 1 for c in chunk])
    start = np.where(end > window, end - window + sink, 0)
    return causal(chunk) & ((frame >= start[:, None]) | (frame < sink))


TINY = dict(heads=8, width=32, rows=4, columns=4)
WAN_1_3B = dict(heads=12, width=128, rows=30, columns=52)
WAN_5B = dict(heads=24, width=128, rows=22, columns=40)


def _shape(table: np.ndarray, model: dict[str, int], *, batch: int = 1) -> Shape:
    return Shape(Table.of(table), **model, batch=batch)


# Training on [clean; noisy]. Seconds of video are latent frames * 4 / frames per second, cut down
# to whole chunks.
TEACHER_FORCING = {
    "tiny_12": _shape(teacher_forcing(chunks(12, 3)), TINY, batch=2),
    "tiny_48": _shape(teacher_forcing(chunks(48, 3)), TINY),
    "tiny_96": _shape(teacher_forcing(chunks(96, 3)), TINY),
    "tiny_192": _shape(teacher_forcing(chunks(192, 3)), TINY),
    "tiny_384": _shape(teacher_forcing(chunks(384, 3)), TINY),
    "1.3b_16s": _shape(teacher_forcing(chunks(63, 3)), WAN_1_3B),
    "1.3b_32s": _shape(teacher_forcing(chunks(126, 3)), WAN_1_3B),
    "1.3b_64s": _shape(teacher_forcing(chunks(255, 3)), WAN_1_3B),
    "5b_16s": _shape(teacher_forcing(chunks(96, 8)), WAN_5B),
    "5b_32s": _shape(teacher_forcing(chunks(192, 8)), WAN_5B),
    "5b_64s": _shape(teacher_forcing(chunks(384, 8)), WAN_5B),
}

# Balanced sequence parallelism: what one rank computes after the exchange of heads for tokens.
INTERLEAVED = {
    "5b_32s_2_ranks": _shape(teacher_forcing(chunks(192, 8), ranks=2), WAN_5B | dict(heads=12)),
    "5b_64s_4_ranks": _shape(teacher_forcing(chunks(384, 8), ranks=4), WAN_5B | dict(heads=6)),
    # Here ranks share a chunk.
    "tiny_12_4_ranks": _shape(teacher_forcing(chunks(12, 2), ranks=4), TINY | dict(heads=2)),
}

# Of a model that streams, and of recaching its window.
CAUSAL = {
    "tiny_window": _shape(windowed(chunks(48, 3), 12, 3), TINY),
    "1.3b_window": _shape(windowed(chunks(63, 3), 12, 3), WAN_1_3B),
    "5b_window": _shape(windowed(chunks(96, 8), 32, 8), WAN_5B),
    "1.3b_recache": _shape(causal(chunks(12, 3)), WAN_1_3B),
    "5b_recache": _shape(causal(chunks(32, 8)), WAN_5B),
    "1.3b_bidirectional": _shape(np.ones((21, 21), bool), WAN_1_3B),
}

AWKWARD = {
    "one_frame": _shape(np.ones((1, 1), bool), TINY),
    "one_token": _shape(np.ones((1, 1), bool), dict(heads=1, width=1, rows=1, columns=1)),
    "image_first": _shape(teacher_forcing(chunks(13, 3, first=1)), TINY),
    "image_first_5b": _shape(teacher_forcing(chunks(97, 8, first=1)), WAN_5B),
    "last_chunk_short": _shape(causal(chunks(11, 4)), dict(heads=3, width=24, rows=3, columns=5)),
    "odd_window": _shape(
        windowed(chunks(23, 5, first=2), 11, 3), dict(heads=1, width=7, rows=1, columns=7), batch=3
    ),
    "fewer_queries": _shape(causal(chunks(14, 3))[9:], TINY),
    "no_keys": _shape(causal(chunks(6, 1)) & (np.arange(6) > 1), TINY),
    "checkers": _shape(np.indices((5, 7)).sum(0) % 2 == 1, TINY | dict(heads=2, columns=3)),
}

SHAPES = TEACHER_FORCING | INTERLEAVED | CAUSAL | AWKWARD
