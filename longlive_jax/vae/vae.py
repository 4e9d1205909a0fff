"""The Wan causal video VAE: 2.1 (4×8×8), 2.2 (4×16×16) and smaller relatives, one family with an
explicit carry.

The first latent of a video stands for one frame, every later one for four. Nothing in the modules
knows where in a video it is: that is in the carry and in `first`, so a video may be coded in pieces
of any length.

`decode`, `stream`, `init_carry` and their encoding counterparts dispatch on the type of the module:
what is written here is the Wan family's; another decoder of the same latents registers its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longlive_jax.config import TAEConfig, VAEConfig
from longlive_jax.layers import Linear
from longlive_jax.vae.fold import patchify, unpatchify
from longlive_jax.vae.layers import (
    Carry,
    CausalConv,
    Down,
    FrameAttention,
    Level,
    Norm,
    ResBlock,
    Shortcut,
    Up,
    chain,
)

Frames = Float[Array, "b t H W 3"]
Latents = Float[Array, "b f h w c"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VAECarry:
    """What an encoder or a decoder remembers of the video so far; the size depends on the picture
    only.
    """

    layers: Carry


def _middle(cfg: VAEConfig, dim: int, rngs: nnx.Rngs) -> list[nnx.Module]:
    before, after = (ResBlock(dim, dim, cfg.kernel, rngs=rngs) for _ in range(2))
    return [before, *([FrameAttention(dim, rngs=rngs)] if cfg.attention else []), after]


class Stack(nnx.Module):
    """Convolution, layers at falling or rising resolution, normalised convolution: either half of
    the VAE.
    """

    def __init__(self, conv_in: CausalConv, layers: list[nnx.Module], conv_out: CausalConv):
        self.conv_in = conv_in
        self.layers = nnx.List(layers)
        self.norm = Norm(conv_out.kernel.shape[-2])
        self.conv_out = conv_out

    def __call__(self, x: Array, carry: Carry, first: bool) -> tuple[Array, Carry]:
        head, body, end = carry or (None, None, None)
        x, head = self.conv_in(x, head, first)
        x, body = chain(self.layers, x, body, first)
        x, end = self.conv_out(jax.nn.silu(self.norm(x)), end, first)
        return x, (head, body, end)


def encoder(cfg: VAEConfig, *, rngs: nnx.Rngs) -> Stack:
    """Frames in channels → mean and log-variance (`Encoder3d`)."""
    dims = [cfg.encoder_dim * m for m in (1, *cfg.multipliers)]
    levels, width = [], dims[0]
    for dim, stride in zip(dims[1:], (*cfg.strides, (1, 1)), strict=True):
        time, space = stride
        widths = [width] + [dim] * cfg.res_blocks
        blocks = [
            ResBlock(a, b, cfg.kernel, rngs=rngs) for a, b in zip(widths, widths[1:], strict=False)
        ]
        resample = [] if stride == (1, 1) else [Down(dim, time=time, space=space, rngs=rngs)]
        shortcut = Shortcut(dim, time=time, space=space, up=False) if cfg.shortcut else None
        levels.append(Level(blocks + resample, shortcut))
        width = dim
    conv_in = CausalConv(3 * cfg.patch**2, dims[0], cfg.kernel, rngs=rngs)
    conv_out = CausalConv(width, 2 * cfg.latent_channels, cfg.kernel, rngs=rngs)
    return Stack(conv_in, levels + _middle(cfg, width, rngs), conv_out)


def decoder(cfg: VAEConfig, *, rngs: nnx.Rngs) -> Stack:
    """Latents → frames in channels (`Decoder3d`). Without shortcuts, upsampling in space halves the
    width (2.1).

    The first convolution looks around itself whatever the configured kernel: a decoder without
    neighbours shows seams.
    """
    dims = [cfg.decoder_dim * m for m in reversed(cfg.multipliers)]
    levels, width = [], dims[0]
    for dim, stride in zip(dims, (*reversed(cfg.strides), (1, 1)), strict=True):
        time, space = stride
        widths = [width] + [dim] * (cfg.res_blocks + 1)
        blocks = [
            ResBlock(a, b, cfg.kernel, rngs=rngs) for a, b in zip(widths, widths[1:], strict=False)
        ]
        up = stride != (1, 1)
        shortcut = Shortcut(dim, time=time, space=space, up=True) if cfg.shortcut and up else None
        width = dim // 2 if space > 1 and not cfg.shortcut else dim
        resample = [Up(dim, width, time=time, space=space, rngs=rngs)] if up else []
        levels.append(Level(blocks + resample, shortcut))
    conv_in = CausalConv(cfg.latent_channels, dims[0], (cfg.kernel[0], 3), rngs=rngs)
    conv_out = CausalConv(width, 3 * cfg.patch**2, cfg.kernel, rngs=rngs)
    return Stack(conv_in, _middle(cfg, dims[0], rngs) + levels, conv_out)


class VAE(nnx.Module):
    """Encoder and decoder with the 1×1×1 convolutions on either side of the latents
    (`vae2_2.py:WanVAE_`).
    """

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.encoder = encoder(cfg, rngs=rngs)
        self.conv1 = Linear(2 * cfg.latent_channels, 2 * cfg.latent_channels, rngs=rngs)
        self.conv2 = Linear(cfg.latent_channels, cfg.latent_channels, rngs=rngs)
        self.decoder = decoder(cfg, rngs=rngs)


def normalise(cfg: VAEConfig, mean: Latents) -> Latents:
    """Posterior means → the latents that the transformer sees, of standard deviation one per
    channel.
    """
    if not cfg.mean:
        return mean
    return (mean - jnp.asarray(cfg.mean, mean.dtype)) / jnp.asarray(cfg.std, mean.dtype)


def denormalise(cfg: VAEConfig, latents: Latents) -> Latents:
    """The inverse of `normalise`."""
    if not cfg.mean:
        return latents
    return latents * jnp.asarray(cfg.std, latents.dtype) + jnp.asarray(cfg.mean, latents.dtype)


def posterior(
    vae: VAE, video: Frames, carry: Carry = None, *, first: bool = True
) -> tuple[Latents, Latents, Carry]:
    """Mean and log-variance of the latents of a video or of its next frames, and the encoder's
    carry.
    """
    x, carry = vae.encoder(patchify(video, vae.cfg.patch), carry, first)
    mean, logvar = jnp.split(vae.conv1(x), 2, -1)
    return mean, logvar, carry


def generate(
    vae: VAE, z: Latents, carry: Carry = None, *, first: bool = True
) -> tuple[Frames, Carry]:
    """Frames, not clamped, of latents that are not normalised, and the decoder's carry."""
    x, carry = vae.decoder(vae.conv2(z), carry, first)
    return unpatchify(x, vae.cfg.patch), carry


@functools.singledispatch
def encode(vae: VAE, video: Frames) -> Latents:
    """A whole video of 1 + 4(f−1) frames in [−1, 1] → f normalised latents (`WanVAE_.encode`, the
    posterior mean).

    Raises ValueError where the frames do not fill whole latents, or the picture whole latent
    pixels.
    """
    check_video(vae.cfg, video, first=True)
    return normalise(vae.cfg, posterior(vae, video.astype(_dtype(vae)))[0])


@functools.singledispatch
def decode(vae: VAE, latents: Latents) -> Frames:
    """A whole video of f normalised latents → 1 + 4(f−1) frames, clamped to [−1, 1]
    (`WanVAE_.decode`).

    All frames are in memory at once; `stream` is for videos of any length.
    """
    z = denormalise(vae.cfg, latents).astype(_dtype(vae))
    return jnp.clip(generate(vae, z)[0], -1, 1)


@functools.singledispatch
def stream(vae: VAE, carry: VAECarry, latents: Latents, *, first: bool) -> tuple[Frames, VAECarry]:
    """The next n latents of a video → their 4n frames (4n−3 where they are a video's first),
    clamped, and the carry.

    `first` is static: two programs serve a video of any length.
    """
    z = denormalise(vae.cfg, latents).astype(_dtype(vae))
    frames, layers = generate(vae, z, None if first else carry.layers, first=first)
    return jnp.clip(frames, -1, 1), VAECarry(layers)


@functools.singledispatch
def encode_stream(
    vae: VAE, carry: VAECarry, video: Frames, *, first: bool
) -> tuple[Latents, VAECarry]:
    """The next 4n frames of a video (1 + 4(n−1) where they are its first) → n normalised latents
    and the carry.
    """
    check_video(vae.cfg, video, first=first)
    video = video.astype(_dtype(vae))
    mean, _, layers = posterior(vae, video, None if first else carry.layers, first=first)
    return normalise(vae.cfg, mean), VAECarry(layers)


@functools.singledispatch
def init_carry(vae: VAE, batch: int, height: int, width: int) -> VAECarry:
    """The decoder's carry before the first chunk, for pictures of height × width pixels."""
    scale = vae.cfg.space_stride
    shape = (batch, 1, height // scale, width // scale, vae.cfg.latent_channels)
    return empty_carry(lambda z: generate(vae, z)[1], shape, _dtype(vae))


@functools.singledispatch
def init_encode_carry(vae: VAE, batch: int, height: int, width: int) -> VAECarry:
    """The encoder's carry before the first frame, for pictures of height × width pixels."""
    shape = (batch, 1, height, width, 3)
    return empty_carry(lambda video: posterior(vae, video)[2], shape, _dtype(vae))


def _dtype(vae: VAE) -> jnp.dtype:
    """What the weights are kept in; activations and carries follow."""
    return vae.conv2.bias.dtype


def empty_carry(
    run: Callable[[Array], Carry], shape: tuple[int, ...], dtype: jnp.dtype
) -> VAECarry:
    """The carry that `run` would make of an input of that shape, all zeros."""
    layers = jax.eval_shape(run, jax.ShapeDtypeStruct(shape, dtype))
    return VAECarry(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), layers))


def check_video(cfg: VAEConfig | TAEConfig, video: Frames, *, first: bool) -> None:
    """Raises ValueError where a video's (first) frames do not fill whole latents, or the picture
    whole latent pixels.
    """
    _, frames, height, width, _ = video.shape
    if (frames - first) % cfg.time_stride:
        expected = f"{'1 + ' if first else ''}a multiple of {cfg.time_stride}"
        raise ValueError(f"{frames} frames do not fill latents: expected {expected}")
    if height % cfg.space_stride or width % cfg.space_stride:
        raise ValueError(f"{height}×{width} pixels: expected multiples of {cfg.space_stride}")
