"""Moving pixels and frames into channels and back, without parameters."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

Video = Float[Array, "_ _ _ _ _"]  # b t h w c; every axis may change on the way


def patchify(x: Video, size: int) -> Video:
    """size × size pixels become channels, (c, column, row) from slow to fast
    (`vae2_2.py:patchify`).
    """
    return rearrange(x, "b t (h q) (w r) c -> b t h w (c r q)", q=size, r=size)


def unpatchify(x: Video, size: int) -> Video:
    """The inverse of `patchify`."""
    return rearrange(x, "b t h w (c r q) -> b t (h q) (w r) c", q=size, r=size)


def mean_down(x: Video, outputs: int, time: int, space: int) -> Video:
    """Folds time × space × space neighbours into channels and averages groups down to `outputs`
    channels.

    Missing frames count as zeros in front: a video's first frame is halved by a time factor of two
    (`vae2_2.py:AvgDown3D`).
    """
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    x = rearrange(x, "b (t p) (h q) (w r) c -> b t h w (c p q r)", p=time, q=space, r=space)
    return x.reshape(*x.shape[:-1], outputs, -1).mean(-1)


def duplicate_up(x: Video, outputs: int, time: int, space: int) -> Video:
    """Repeats channels and unfolds them into time × space × space neighbours
    (`vae2_2.py:DupUp3D`).
    """
    x = jnp.repeat(x, outputs * time * space * space // x.shape[-1], -1)
    return rearrange(x, "b t h w (c p q r) -> b (t p) (h q) (w r) c", p=time, q=space, r=space)


def pixel_unshuffle(x: Video, size: int) -> Video:
    """size × size pixels become channels, (c, row, column) from slow to fast
    (`torch.nn.functional.pixel_unshuffle`).
    """
    return rearrange(x, "b t (h q) (w r) c -> b t h w (c q r)", q=size, r=size)


def pixel_shuffle(x: Video, size: int) -> Video:
    """The inverse of `pixel_unshuffle`."""
    return rearrange(x, "b t h w (c q r) -> b t (h q) (w r) c", q=size, r=size)
