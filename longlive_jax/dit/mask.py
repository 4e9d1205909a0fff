"""Who may attend whom, as a small table over latent frames.

Every latent frame of a sequence carries a label: is it noisy, which chunk is it in, which frame is
it. A table is a boolean matrix over these labels, and one rule makes all of them:

    clean → clean   key chunk <= query chunk          noisy → clean   key chunk < query chunk
    noisy → noisy   same chunk, same copy             clean → noisy   never

For two chunks of one frame, teacher forcing over [clean; noisy] is (rows query, columns key):

           c0 c1 n0 n1
      c0 [  1  .  .  . ]
      c1 [  1  1  .  . ]
      n0 [  .  .  1  . ]
      n1 [  1  .  .  1 ]

Chunk-causal attention is the clean half alone, bidirectional attention is one chunk, and a
sequence-parallel order is the same labels permuted (LongLive 2.0 section 2.1;
`causal_model.py:_prepare_teacher_forcing_mask` and its siblings).
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Labels:
    """One entry per latent frame of the sequence, in sequence order."""

    noisy: tuple[bool, ...]
    chunk: tuple[int, ...]
    frame: tuple[int, ...]  # position in the video
    copy: tuple[int, ...]  # noisy copies of a chunk do not see each other

    def __post_init__(self):
        if not len(self.noisy) == len(self.chunk) == len(self.frame) == len(self.copy):
            raise ValueError("labels need a flag, a chunk, a frame and a copy for every entry")

    def __add__(self, other: Labels) -> Labels:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Labels(*(a + b for a, b in pairs))

    def __getitem__(self, part: slice) -> Labels:
        return Labels(*(x[part] for x in dataclasses.astuple(self)))


def clean(frames: int, chunk: int, *, first: int | None = None) -> Labels:
    """A clean video. `first` is the length of the first chunk where it differs (1: an image)."""
    first = chunk if first is None else first
    of_frame = tuple(0 if f < first else 1 + (f - first) // chunk for f in range(frames))
    return Labels((False,) * frames, of_frame, tuple(range(frames)), (0,) * frames)


def as_noisy(labels: Labels, copy: int = 0) -> Labels:
    count = len(labels.frame)
    return dataclasses.replace(labels, noisy=(True,) * count, copy=(copy,) * count)


def teacher_forcing(video: Labels) -> Labels:
    """[all clean; all noisy]."""
    return video + as_noisy(video)


def interleaved(video: Labels, ranks: int) -> Labels:
    """[clean of rank 0, noisy of rank 0, clean of rank 1, …], as Balanced SP leaves it after the
    all-to-all.
    """
    frames = len(video.frame)
    if frames % ranks:
        raise ValueError(f"{frames} latent frames do not divide over {ranks} ranks")
    share = frames // ranks
    parts = [teacher_forcing(video[r * share : (r + 1) * share]) for r in range(ranks)]
    return sum(parts[1:], parts[0])


def table(labels: Labels, *, window: int | None = None, sink: int = 0) -> np.ndarray:
    """Bool [f f], rows query, columns key.

    window: frames that a query sees, counted back from the end of its own chunk and including it,
    None for all (LongLive 1.0 `_prepare_blockwise_causal_attn_mask`). sink: first frames that stay
    visible once the window has left them; they take their room from it, as in the streaming cache.
    """
    noisy, chunk, frame, copy = (np.array(x) for x in dataclasses.astuple(labels))
    q, k = np.s_[:, None], np.s_[None, :]
    past = np.where(noisy[q], chunk[k] < chunk[q], chunk[k] <= chunk[q]) & ~noisy[k]
    own = noisy[q] & noisy[k] & (chunk[q] == chunk[k]) & (copy[q] == copy[k])
    if window is None:
        return past | own
    end = np.array([frame[chunk == c].max() + 1 for c in chunk])
    start = np.where(end > window, end - window + sink, 0)
    return (past & ((frame[k] >= start[q]) | (frame[k] < sink))) | own
