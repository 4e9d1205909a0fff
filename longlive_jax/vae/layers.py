"""Layers of the causal video VAE. Each takes what it must remember and returns what the next chunk
must.

Every layer is called as `layer(x, carry, first) -> (y, carry)`. A carry of None means that the
video starts here; `first` says so to the layers that treat a video's first frame apart. Any number
of frames may be passed at once.

`before`, `present` and `alone` are all that the layers ask of a carry. It need not be remembered
frames: a type that gets them elsewhere registers its own, and one value of it serves all layers.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from longlive_jax.layers import Linear, linear
from longlive_jax.vae.fold import duplicate_up, mean_down

Video = Float[Array, "_ _ _ _ _"]  # b t h w c; every axis may change on the way
Carry = Any  # a tree of frames, in the order in which they are needed

_SAME = ((1, 1), (1, 1))
_CORNER = ((0, 1), (0, 1))  # the strided convolution pads on the right and at the bottom only


@functools.singledispatch
def before(carry: Any, x: Video, frames: int) -> Video:
    """The `frames` frames before x: what is remembered, zeros at a video's start."""
    return jnp.zeros((x.shape[0], frames, *x.shape[2:]), x.dtype) if carry is None else carry


@functools.singledispatch
def present(carry: Any, x: Video) -> Video:
    """x, with zeros for those of its frames that lie before the video. Here there are none."""
    del carry
    return x


@functools.singledispatch
def alone(carry: Any, x: Video, y: Video) -> Video:
    """y, which merges frames of x, with the video's first frame as it was. Here it is not in x."""
    del carry, x
    return y


def extend(x: Video, carry: Carry, frames: int) -> Video:
    """The `frames` frames before x in front of it."""
    return jnp.concatenate([before(carry, x, frames), present(carry, x)], 1)


def parts(carry: Carry, count: int) -> tuple[Carry, ...]:
    """The carries of `count` layers inside; what is not a tuple of them is each one's."""
    return carry if isinstance(carry, tuple) else (carry,) * count


def tail(x: Video, frames: int) -> Video:
    return x[:, x.shape[1] - frames :]


def taps(x: Video, count: int, stride: int = 1) -> Video:
    """`count` neighbouring frames side by side in the channels, oldest first: b n h w (count c)."""
    n = (x.shape[1] - count) // stride + 1
    stops = [max(i + (n - 1) * stride + 1, i) for i in range(count)]
    return jnp.concatenate([x[:, i:stop:stride] for i, stop in enumerate(stops)], -1)


def conv2d(x: Video, kernel: Array, bias: Array | None, stride: int = 1, padding=_SAME) -> Video:
    """The same 2-D convolution of every frame."""
    y = jax.lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]),
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = y.reshape(*x.shape[:2], *y.shape[1:])
    return y if bias is None else y + bias


def _init(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float = 1.0) -> Array:
    return jax.random.normal(rngs.params(), shape) * scale * math.prod(shape[:-1]) ** -0.5


class CausalConv(nnx.Module):
    """Convolution over a neighbourhood in space, in a frame and those before it
    (`vae2_2.py:CausalConv3d`).

    It runs as one 2-D convolution whose input channels are the time taps side by side: XLA's 3-D
    convolution takes two to three times as long on CPUs, forward and gradient. `kernel` is (time,
    space).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int],
        *,
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        time, space = kernel
        self.kernel = nnx.Param(_init(rngs, (space, space, time, inputs, outputs), scale))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Video, carry: Carry, first: bool) -> tuple[Video, Carry]:
        del first
        height, width, time, inputs, outputs = self.kernel.shape
        kernel = self.kernel[...].reshape(height, width, time * inputs, outputs)
        x = extend(x, carry, time - 1)
        if width == 1:
            y = linear(taps(x, time), kernel[0, 0], self.bias[...])
        else:
            y = conv2d(taps(x, time), kernel, self.bias[...])
        return y, tail(x, time - 1)


class FrameConv(nnx.Module):
    """3×3 convolution of single frames (the `nn.Conv2d` of `vae2_2.py:Resample`)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_init(rngs, (3, 3, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x: Video, stride: int = 1, padding=_SAME) -> Video:
        bias = None if self.bias is None else self.bias[...]
        return conv2d(x, self.kernel[...], bias, stride, padding)


class Norm(nnx.Module):
    """x / |x| · sqrt(c) · scale over the channels, with no epsilon in the mean
    (`vae2_2.py:RMS_norm`).
    """

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones(dim))

    def __call__(self, x: Video) -> Video:
        y = x.astype(jnp.float32)
        squares = jnp.sum(y * y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.maximum(squares, 1e-24)) * x.shape[-1] ** 0.5
        return y.astype(x.dtype) * self.scale[...]


class ResBlock(nnx.Module):
    """Two normalised convolutions beside a shortcut (`vae2_2.py:ResidualBlock`)."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], *, rngs: nnx.Rngs):
        self.norm_in, self.norm_out = Norm(inputs), Norm(outputs)
        self.conv_in = CausalConv(inputs, outputs, kernel, rngs=rngs)
        self.conv_out = CausalConv(outputs, outputs, kernel, scale=0.1, rngs=rngs)
        self.shortcut = None if inputs == outputs else Linear(inputs, outputs, rngs=rngs)

    def __call__(self, x: Video, carry: Carry, first: bool) -> tuple[Video, Carry]:
        one, two = parts(carry, 2)
        y, one = self.conv_in(jax.nn.silu(self.norm_in(x)), one, first)
        y, two = self.conv_out(jax.nn.silu(self.norm_out(y)), two, first)
        return y + (x if self.shortcut is None else self.shortcut(x)), (one, two)


class FrameAttention(nnx.Module):
    """Single-head self-attention among the pixels of one frame (`vae2_2.py:AttentionBlock`).
    Nothing to carry.
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.norm = Norm(dim)
        self.qkv = Linear(dim, 3 * dim, rngs=rngs)
        self.proj = Linear(dim, dim, scale=0.0, rngs=rngs)

    def __call__(self, x: Video, carry: Carry, first: bool) -> tuple[Video, Carry]:
        del first
        rows = rearrange(self.qkv(self.norm(x)), "b t h w c -> (b t) (h w) 1 c")
        with jax.numpy_dtype_promotion("standard"):  # inside, bfloat16 meets a float32 scale
            y = jax.nn.dot_product_attention(*jnp.split(rows, 3, -1))
        return x + self.proj(y.reshape(x.shape)), carry


class Down(nnx.Module):
    """Halves space with a strided convolution, then time with another (`vae2_2.py:Resample`,
    downsample modes).

    A video's first frame is not merged with anything: it passes the time step unchanged.
    """

    def __init__(self, dim: int, *, time: int, space: int, rngs: nnx.Rngs):
        self.space_conv = FrameConv(dim, dim, rngs=rngs) if space > 1 else None
        self.time_conv = Linear(3 * dim, dim, rngs=rngs) if time > 1 else None
        self.time, self.space = time, space

    def __call__(self, x: Video, carry: Carry, first: bool) -> tuple[Video, Carry]:
        if self.space_conv is not None:
            x = self.space_conv(x, self.space, _CORNER)
        if self.time_conv is None:
            return x, carry
        whole = x if first else extend(x, carry, 1)
        y = self.time_conv(taps(whole, 3, self.time))
        y = jnp.concatenate([x[:, :1], y], 1) if first else alone(carry, x, y)
        return y, tail(x, 1)


class Up(nnx.Module):
    """Doubles time, then space (`vae2_2.py:Resample`, upsample modes).

    A video's first frame stays one frame, and the time convolution never sees it: the second has
    zeros on its left.
    """

    def __init__(self, dim: int, outputs: int, *, time: int, space: int, rngs: nnx.Rngs):
        self.time_conv = Linear(3 * dim, time * dim, rngs=rngs) if time > 1 else None
        self.space_conv = FrameConv(dim, outputs, rngs=rngs) if space > 1 else None
        self.time, self.space = time, space

    def __call__(self, x: Video, carry: Carry, first: bool) -> tuple[Video, Carry]:
        if self.time_conv is not None:
            head, x = (x[:, :1], x[:, 1:]) if first else (x[:, :0], x)
            whole = extend(x, carry, 2)
            y = rearrange(
                self.time_conv(taps(whole, 3)), "b t h w (p c) -> b (t p) h w c", p=self.time
            )
            x, carry = jnp.concatenate([head, y], 1), tail(whole, 2)
        if self.space_conv is not None:
            x = jnp.repeat(jnp.repeat(x, self.space, 2), self.space, 3)
            x = self.space_conv(x)
        return x, carry


def chain(layers, x: Video, carry: Carry, first: bool) -> tuple[Video, Carry]:
    """The layers one after the other, each with its own part of the carry."""
    carries = []
    for layer, part in zip(layers, parts(carry, len(layers)), strict=True):
        x, part = layer(x, part, first)
        carries.append(part)
    return x, tuple(carries)


class Shortcut(nnx.Module):
    """Averages down or duplicates up to another resolution and channel count; no parameters,
    nothing to carry.
    """

    def __init__(self, outputs: int, *, time: int, space: int, up: bool):
        self.outputs, self.time, self.space, self.up = outputs, time, space, up

    def __call__(self, x: Video, first: bool) -> Video:
        if self.up:
            y = duplicate_up(x, self.outputs, self.time, self.space)
            return y[:, self.time - 1 :] if first else y
        return mean_down(x, self.outputs, self.time, self.space)


class Level(nnx.Module):
    """Residual blocks and a change of resolution, with the parameter-free shortcut of 2.2 around
    them.

    `vae2_2.py:Down_ResidualBlock`, `Up_ResidualBlock`; without the shortcut, one level of
    `vae.py`'s flat lists.
    """

    def __init__(self, layers: list[nnx.Module], shortcut: Shortcut | None):
        self.layers = nnx.List(layers)
        self.shortcut = shortcut

    def __call__(self, x: Video, carry: Carry, first: bool) -> tuple[Video, Carry]:
        y, after = chain(self.layers, x, carry, first)
        return y if self.shortcut is None else y + self.shortcut(present(carry, x), first), after
