"""The toy world's judge: reads a scene back off the frames by deterministic image analysis.

The object is the bright blob on the dark background. Its colour is the nearest of the eight, its
shape the template of equal area that overlaps it best about its centroid, its motion the one whose
velocities fit the observed ones best at some phase; the background is the nearest of the five
pictures. Everything respects the torus. What has no object of a plausible size in at least half of
its frames is unreadable: `read` returns None, which counts as wrong everywhere.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, UInt8

from longlive_jax.data.caption import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene, Thing
from longlive_jax.data.toy_world import BACKDROPS, CIRCLE_FRAMES, RGB, SIZE, displacement, inside

BRIGHT = 0.5  # of full scale: backgrounds stay below 0.31, objects have a channel above 0.84
DARK = 0.3  # where a pixel begins to count as partly covered by the object
AREA = (100, 620)  # pixels of a readable object; the drawn ones have 250 to 290
OVERLAP = 0.6  # intersection over union with the best template of a readable object
JUMP = 5.0  # pixels a frame; a velocity error beyond it (a glitch) counts no more than this
TEMPI = (0.8, 0.9, 1.0, 1.1, 1.2)  # a motion may run this much slower or faster

_PIXEL = np.arange(SIZE) + 0.5
_PHASE = np.exp(2j * np.pi * _PIXEL / SIZE)
_PALETTE = np.array([RGB[name] for name in COLOURS])
_PICTURES = np.stack([BACKDROPS[name] for name in BACKGROUNDS]).astype(np.float32) / 255


def _wrap(distance: np.ndarray) -> np.ndarray:
    return (distance + SIZE / 2) % SIZE - SIZE / 2


def _grow(mask: np.ndarray) -> np.ndarray:
    """The mask and its four neighbours on the torus."""
    rows = mask | np.roll(mask, 1, 1) | np.roll(mask, -1, 1)
    return rows | np.roll(mask, 1, 2) | np.roll(mask, -1, 2)


def blob(bright: Bool[np.ndarray, "t 64 64"]) -> Bool[np.ndarray, "t 64 64"]:
    """Of every frame, the connected bright region that is densest in some 17x17 square.

    All False where nothing is bright.
    """
    spectrum = np.fft.rfft2(bright.astype(np.float32))
    square = np.zeros((SIZE, SIZE), np.float32)
    square[np.ix_(np.arange(-8, 9), np.arange(-8, 9))] = 1
    dense = np.rint(np.fft.irfft2(spectrum * np.fft.rfft2(square), s=(SIZE, SIZE)))
    peak = dense.reshape(len(bright), -1).argmax(-1)
    seed = np.zeros((len(bright), SIZE * SIZE), bool)
    seed[np.arange(len(bright)), peak] = True
    seed = seed.reshape(bright.shape)
    for _ in range(4):
        seed = _grow(seed)
    found, before = seed & bright, -1
    while (size := int(found.sum())) != before:
        found, before = _grow(found) & bright, size
    return found


@dataclasses.dataclass(frozen=True)
class Track:
    """The object in every frame: whether readable, where (x, y), its pixels and shape overlaps."""

    readable: Bool[np.ndarray, " t"]
    place: Float[np.ndarray, "t 2"]
    mask: Bool[np.ndarray, "t 64 64"]
    overlap: Float[np.ndarray, "t shape"]


def track(frames: UInt8[np.ndarray, "t 64 64 3"]) -> Track:
    """Follows the object through the frames.

    Place, area and overlap weigh a pixel by its brightness between `DARK` and the object's mean,
    so that a rim half covered counts half.
    """
    value = np.maximum.reduce([frames[..., i] for i in range(3)]) / 255.0
    mask = blob(value > BRIGHT)
    mean = (value * mask).sum((1, 2)) / np.maximum(mask.sum((1, 2)), 1)
    ramp = (value - DARK) / np.maximum(mean - DARK, BRIGHT - DARK)[:, None, None]
    cover = np.clip(ramp, 0, 1) * _grow(mask)
    area = cover.sum((1, 2))
    x = np.angle((cover.sum(1) * _PHASE).sum(-1)) / (2 * np.pi) * SIZE
    y = np.angle((cover.sum(2) * _PHASE).sum(-1)) / (2 * np.pi) * SIZE
    dx, dy = _wrap(_PIXEL - x[:, None])[:, None, :], _wrap(_PIXEL - y[:, None])[:, :, None]
    overlap = np.empty((len(frames), len(SHAPES)))
    for i, shape in enumerate(SHAPES):
        template = np.clip(inside(shape, dx, dy, area[:, None, None]) + 0.5, 0, 1)
        union = np.maximum(template, cover).sum((1, 2))
        overlap[:, i] = np.minimum(template, cover).sum((1, 2)) / np.maximum(union, 1)
    readable = (area >= AREA[0]) & (area <= AREA[1]) & (overlap.max(-1) >= OVERLAP)
    return Track(readable, np.stack([x, y], -1), mask, overlap)


def _colour(frames: np.ndarray, seen: Track) -> str:
    """The palette colour nearest the object's, both at full brightness; a vote over frames."""
    inner = ~_grow(~seen.mask)  # without the rim, which is mixed with the background
    count = np.maximum(inner.sum((1, 2)), 1)[:, None]
    mean = np.einsum("thw,thwc->tc", inner, frames, dtype=np.float64) / count
    mean = mean[seen.readable] / np.maximum(mean[seen.readable].max(-1, keepdims=True), 1)
    palette = _PALETTE / _PALETTE.max(-1, keepdims=True)
    nearest = ((mean[:, None] - palette) ** 2).sum(-1).argmin(-1)
    return COLOURS[int(np.bincount(nearest).argmax())]


def _velocities() -> tuple[np.ndarray, np.ndarray]:
    """Velocities of every motion at every phase and tempo: [k, 48, 2], and motion index [k]."""
    rows, owners = [], []
    for i, motion in enumerate(MOTIONS):
        phases = np.arange(0, CIRCLE_FRAMES) if motion in ("bounces", "circles") else [0]
        for tempo in TEMPI:
            for phase in phases:
                moved = displacement(motion, phase + tempo * np.arange(49))
                rows.append(np.diff(moved, axis=0))
                owners.append(i)
    return np.stack(rows), np.array(owners)


_VELOCITIES, _OWNERS = _velocities()


def _motion(seen: Track) -> str | None:
    """The motion whose velocities fit best, or None with too few pairs of readable frames."""
    both = (seen.readable[1:] & seen.readable[:-1])[: _VELOCITIES.shape[1]]
    if both.sum() < max(2, len(both) // 2):
        return None
    step = _wrap(np.diff(seen.place, axis=0))[: len(both)]
    error = np.linalg.norm(_VELOCITIES[:, : len(both)] - step, axis=-1)
    fit = np.minimum(error, JUMP)[:, both].mean(-1)
    return MOTIONS[_OWNERS[int(fit.argmin())]]


def _background(frames: np.ndarray, seen: Track) -> str:
    """The picture nearest to what lies around the object; it is static, so a few frames do."""
    some = slice(None, None, max(1, len(frames) // 8))
    around = _grow(_grow(seen.mask[some]))[..., None]
    shown = frames[some].astype(np.float32) / 255
    error = [float((np.abs(shown - picture) * ~around).sum()) for picture in _PICTURES]
    return BACKGROUNDS[int(np.argmin(error))]


def read(frames: UInt8[np.ndarray, "t 64 64 3"]) -> Scene | None:
    """The one-thing scene a window of 4 to 48 frames shows, or None if no object is readable.

    A motion takes at least 12 frames to tell; in fewer its reading is a guess.
    """
    seen = track(frames)
    if seen.readable.mean() < 0.5:
        return None
    motion = _motion(seen)
    if motion is None:
        return None
    shape = SHAPES[int(seen.overlap[seen.readable].mean(0).argmax())]
    return Scene((Thing(_colour(frames, seen), shape, motion),), _background(frames, seen))
