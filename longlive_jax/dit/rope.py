"""Rotary phases over (latent frame, row, column) (Wan2.2 `model.py:rope_params, rope_apply`)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from longlive_jax.config import DiTConfig

_STEP = 1024  # frames of the coarse count of positions


def frequencies(cfg: DiTConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Radians per step along time, rows and columns; head_dim / 2 numbers in all.

    Rows and columns get a third of the complex channels each, rounded down; time gets the rest.
    """
    pairs = cfg.head_dim // 2
    space = pairs // 3

    def ladder(count: int) -> np.ndarray:
        return cfg.rope_theta ** (-np.arange(count) / count)

    def harmonics(period: int) -> np.ndarray:
        return 2 * np.pi / period * (1 + np.arange(space) % max(1, period // 2))

    rows, columns = (
        (harmonics(p) for p in cfg.rope_period) if cfg.rope_period else (ladder(space),) * 2
    )
    return ladder(pairs - 2 * space), rows, columns


def phases(
    cfg: DiTConfig, frames: Float[Array, "b f"], rows: int, columns: int
) -> Float[Array, "b n p"]:
    """Angle of every token and complex channel; n = f * rows * columns, p = head_dim / 2.

    `frames` are temporal positions in latent frames: (start + index + shot offset) * time scale, by
    the caller. All angles lie in [-pi, pi], where float32 is finest.
    """
    _, row, column = frequencies(cfg)
    f = in_time(cfg, frames)[:, :, None, None]  # b f 1 1 p
    r = _table(rows, row)[None, None, :, None]  # 1 1 h 1 p
    c = _table(columns, column)[None, None, None]  # 1 1 1 w p
    shape = (*frames.shape, rows, columns)
    angles = jnp.concatenate([jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in (f, r, c)], -1)
    return angles.reshape(frames.shape[0], -1, angles.shape[-1])  # b n p


def in_time(cfg: DiTConfig, frames: Float[Array, "b f"]) -> Float[Array, "b f t"]:
    """Of `phases` those that turn with time, the first ones: the same for all tokens of a frame."""
    return _wrapped(frames.astype(jnp.float32)[..., None], frequencies(cfg)[0])


def in_space(angles: Float[Array, "b n p"], pairs: int) -> Float[Array, "b n p"]:
    """Of `phases` those that turn with rows and columns; none of the first `pairs`."""
    return angles.at[..., :pairs].set(0.0)


def _table(count: int, frequency: np.ndarray) -> Float[Array, "n p"]:
    """Angles of the first `count` rows or columns. Whole turns are dropped in float64: a float32
    angle of 100 rad is off by up to 4e-6.
    """
    angles = np.arange(count)[:, None] * frequency
    angles -= 2 * np.pi * np.round(angles / (2 * np.pi))
    return jnp.asarray(angles, jnp.float32)


def _wrapped(position: Float[Array, "*b 1"], frequency: np.ndarray) -> Float[Array, "*b p"]:
    """position * frequency in radians, less whole turns: to 2e-6 for half frames up to 2^23.

    A float32 angle of 1e5 rad is off by up to 4e-3. Whole turns can be dropped early from exact
    products only: a position is _STEP coarse + fine, at most 13 bits each, times the first 11 bits
    of a fraction of a turn, which fits 24 bits. Products with the rest are below a turn.
    """
    coarse = jnp.floor(position / _STEP)
    turns = jnp.float32(0.0)
    for count, frames in ((coarse, _STEP), (position - _STEP * coarse, 1)):
        part = frames * frequency / (2 * np.pi)  # of a turn, in float64
        part -= np.round(part)
        head = np.round(part * 2**12) / 2**12
        exact = count * np.float32(head)
        turns += exact - jnp.round(exact) + count * np.float32(part - head)
    return np.float32(2 * np.pi) * (turns - jnp.round(turns))


def rotate(x: Float[Array, "b n a d"], angles: Float[Array, "b n p"]) -> Float[Array, "b n a d"]:
    """Turns each pair of neighbouring channels (2i, 2i + 1) by its angle, in float32."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]  # b n 1 p
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.reshape(x.shape).astype(x.dtype)
