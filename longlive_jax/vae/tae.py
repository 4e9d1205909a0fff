"""The tiny autoencoder TAEHV: a few plain convolutions in the place of a Wan VAE.

It reads and writes the same normalised latents, so it decodes whatever the VAE would, many times
faster and a little less sharp. Time passes through `MemBlock`s only, each of which remembers one
frame. It decodes in pieces of any length behind `vae.stream`; it encodes whole clips only, because
a latent sees frames that come after its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from longlive_jax.config import TAEConfig
from longlive_jax.errors import InputError
from longlive_jax.layers import Linear
from longlive_jax.vae import vae as coder
from longlive_jax.vae.fold import pixel_shuffle, pixel_unshuffle
from longlive_jax.vae.layers import Carry, FrameConv, Video, chain, extend, tail
from longlive_jax.vae.vae import VAECarry

Frames = Float[Array, "b t H W 3"]
Latents = Float[Array, "b f h w c"]


class MemBlock(nnx.Module):
    """Three convolutions over a frame and the one before it, added to the frame
    (`taehv.py:MemBlock`). It carries its last input.
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        widths = (2 * dim, dim, dim, dim)
        convs = (FrameConv(a, b, rngs=rngs) for a, b in zip(widths, widths[1:], strict=False))
        self.convs = nnx.List(list(convs))

    def __call__(self, x: Video, carry: Carry, first: bool) -> tuple[Video, Carry]:
        del first
        whole = extend(x, carry, 1)
        first_conv, *convs = self.convs
        y = first_conv(jnp.concatenate([x, whole[:, :-1]], -1))
        for conv in convs:
            y = conv(jax.nn.relu(y))
        return jax.nn.relu(y + x), tail(whole, 1)


class Shrink(nnx.Module):
    """Merges `time` frames into one, then strides over space (`taehv.py:TPool` and its
    convolution). Nothing to carry.
    """

    def __init__(self, dim: int, *, time: int, space: int, rngs: nnx.Rngs):
        self.time_conv = Linear(time * dim, dim, bias=False, rngs=rngs)
        self.space_conv = FrameConv(dim, dim, bias=False, rngs=rngs)
        self.time, self.space = time, space

    def __call__(self, x: Video, carry: Carry, first: bool) -> tuple[Video, Carry]:
        del first
        x = rearrange(x, "b (t p) h w c -> b t h w (p c)", p=self.time)
        return self.space_conv(self.time_conv(x), self.space), carry


class Grow(nnx.Module):
    """Makes `time` frames of one, then repeats pixels and convolves (`taehv.py:TGrow` and its
    convolution). Nothing to carry.

    The reference repeats pixels first. The time step works on single pixels, so the order makes no
    difference but the cost.
    """

    def __init__(self, dim: int, outputs: int, *, time: int, space: int, rngs: nnx.Rngs):
        self.time_conv = Linear(dim, time * dim, bias=False, rngs=rngs)
        self.space_conv = FrameConv(dim, outputs, bias=False, rngs=rngs)
        self.time, self.space = time, space

    def __call__(self, x: Video, carry: Carry, first: bool) -> tuple[Video, Carry]:
        del first
        x = rearrange(self.time_conv(x), "b t h w (p c) -> b (t p) h w c", p=self.time)
        x = jnp.repeat(jnp.repeat(x, self.space, 2), self.space, 3)
        return self.space_conv(x), carry


class Plain(nnx.Module):
    """Convolution, layers, convolution: either half of a `TAE`."""

    def __init__(self, conv_in: FrameConv, layers: list[nnx.Module], conv_out: FrameConv):
        self.conv_in = conv_in
        self.layers = nnx.List(layers)
        self.conv_out = conv_out

    def __call__(self, x: Video, carry: Carry, first: bool) -> tuple[Video, Carry]:
        x, carry = chain(self.layers, jax.nn.relu(self.conv_in(x)), carry, first)
        return self.conv_out(jax.nn.relu(x)), carry  # the encoder's last layer ends in one as well


def _encoder(cfg: TAEConfig, rngs: nnx.Rngs) -> Plain:
    dim, layers = cfg.encoder_dim, []
    for time, space in cfg.strides:
        blocks = [MemBlock(dim, rngs=rngs) for _ in range(cfg.blocks)]
        layers += [Shrink(dim, time=time, space=space, rngs=rngs), *blocks]
    conv_in = FrameConv(3 * cfg.patch**2, dim, rngs=rngs)
    return Plain(conv_in, layers, FrameConv(dim, cfg.latent_channels, rngs=rngs))


def _decoder(cfg: TAEConfig, rngs: nnx.Rngs) -> Plain:
    dims, layers = cfg.decoder_dims, []
    for dim, outputs, (time, space) in zip(dims[:-1], dims[1:], cfg.strides[::-1], strict=True):
        blocks = [MemBlock(dim, rngs=rngs) for _ in range(cfg.blocks)]
        layers += [*blocks, Grow(dim, outputs, time=time, space=space, rngs=rngs)]
    conv_in = FrameConv(cfg.latent_channels, dims[0], rngs=rngs)
    return Plain(conv_in, layers, FrameConv(dims[-1], 3 * cfg.patch**2, rngs=rngs))


class TAE(nnx.Module):
    """Encoder and decoder (`taehv.py:TAEHV`)."""

    def __init__(self, cfg: TAEConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.encoder = _encoder(cfg, rngs)
        self.decoder = _decoder(cfg, rngs)


def generate(tae: TAE, latents: Latents, carry: Carry = None) -> tuple[Frames, Carry]:
    """`time_stride` frames in about [0, 1], not clamped, of every latent, and the decoder's carry.

    A video's first latent stands for the last of its frames only: the others are the caller's to
    drop.
    """
    z = jnp.tanh(latents.astype(_dtype(tae)) / 3) * 3
    x, carry = tae.decoder(z, carry, False)
    return pixel_shuffle(x, tae.cfg.patch), carry


@coder.stream.register(TAE)
def _stream(tae: TAE, carry: VAECarry, latents: Latents, *, first: bool) -> tuple[Frames, VAECarry]:
    frames, layers = generate(tae, latents, None if first else carry.layers)
    frames = frames[:, tae.cfg.time_stride - 1 :] if first else frames
    return jnp.clip(2 * frames - 1, -1, 1), VAECarry(layers)


@coder.decode.register(TAE)
def _decode(tae: TAE, latents: Latents) -> Frames:
    frames = generate(tae, latents)[0][:, tae.cfg.time_stride - 1 :]
    return jnp.clip(2 * frames - 1, -1, 1)


@coder.encode.register(TAE)
def _encode(tae: TAE, video: Frames) -> Latents:
    """The reference fills up at the end: a clip of 1 + 4(f−1) frames gets three more of its last
    (`taehv.py:TAEHV.encode_video`).
    """
    cfg = tae.cfg
    coder.check_video(cfg, video, first=True)
    more = [(0, 0), (0, -video.shape[1] % cfg.time_stride), (0, 0), (0, 0), (0, 0)]
    x = jnp.pad((video.astype(_dtype(tae)) + 1) / 2, more, mode="edge")
    return tae.encoder(pixel_unshuffle(x, cfg.patch), None, False)[0]


@coder.init_carry.register(TAE)
def _init_carry(tae: TAE, batch: int, height: int, width: int) -> VAECarry:
    cfg = tae.cfg
    shape = (batch, 1, height // cfg.space_stride, width // cfg.space_stride, cfg.latent_channels)
    return coder.empty_carry(lambda z: generate(tae, z)[1], shape, _dtype(tae))


@coder.init_encode_carry.register(TAE)
@coder.encode_stream.register(TAE)
def _no_encode_stream(tae: TAE, *_, **__):
    raise InputError("a tiny autoencoder encodes whole clips only, not streams: use the full VAE")


def _dtype(tae: TAE) -> jnp.dtype:
    return tae.decoder.conv_in.bias.dtype
