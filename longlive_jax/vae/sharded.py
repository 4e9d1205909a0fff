"""Encoding a video on the ranks of a sequence-parallel group, each of which has a piece of it
(LongLive 2.0 section 2.1 and appendix C).

Of a video of f latents, P ranks make f/P each, in order. Two ways of seeing the frames before:

    encode_rank       each layer gets the end of the left neighbour's input, as a stream would have
                      remembered it: exact, and nothing is computed twice
    encode_with_halo  a rank starts so many latents early as reach its own, and drops them
                      (`sp_training.py:SequenceParallelHelper`): the reference to test against

Ranks run one program on equal shapes, but a video's first latent is one frame. `lay_out` puts blank
frames before it; the layers of rank 0 take these as not there.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from longlive_jax.config import VAEConfig
from longlive_jax.errors import InputError
from longlive_jax.sharding import BATCH, SEQ
from longlive_jax.vae.layers import Video, alone, before, present, tail
from longlive_jax.vae.vae import VAE, Frames, Latents, VAECarry, check_video, encode, encode_stream


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """In the place of a carry: the frames before are those of the ranks to the left on the mesh
    axis `axis`. Each rank has the frames of `latents` latents, laid out by `lay_out`.
    """

    axis: str
    latents: int

    def blank(self, frames: int) -> int:
        """How many of a rank's frames are blank on rank 0, at that rate of frames."""
        return frames // self.latents - 1


@before.register
def _(carry: Neighbour, x: Video, frames: int) -> Video:
    """Where the left neighbour has too few, the one beyond it sends the rest. Ranks to whom nobody
    sends get zeros, as at a video's start.
    """
    x, count, ranks = present(carry, x), x.shape[1], jax.lax.axis_size(carry.axis)
    pieces = [x[:, :0]]
    for hop, have in enumerate(range(0, frames, count), 1):
        piece = tail(x, min(frames - have, count))
        pairs = [(i, i + hop) for i in range(ranks - hop)]
        sent = jax.lax.ppermute(piece, carry.axis, pairs) if pairs else jnp.zeros_like(piece)
        pieces.append(sent)
    return jnp.concatenate(pieces[::-1], 1)


@present.register
def _(carry: Neighbour, x: Video) -> Video:
    count = x.shape[1]
    return jnp.where(_on_first_rank(carry, jnp.arange(count) < carry.blank(count)), 0.0, x)


@alone.register
def _(carry: Neighbour, x: Video, y: Video) -> Video:
    count, time = y.shape[1], x.shape[1] // y.shape[1]
    here = _on_first_rank(carry, jnp.arange(count) == carry.blank(count))
    return jnp.where(here, x[:, time - 1 :: time], y)


def _on_first_rank(carry: Neighbour, frames: Bool[Array, " t"]) -> Bool[Array, "t 1 1 1"]:
    return (frames & (jax.lax.axis_index(carry.axis) == 0))[:, None, None, None]


def lay_out(cfg: VAEConfig, video: Frames) -> Float[Array, "b _ H W 3"]:
    """A whole video of 1 + 4(f−1) frames → 4f, of which the first three are blank: every latent has
    as many frames, so that equal pieces are whole latents.
    """
    check_video(cfg, video, first=True)
    return jnp.pad(video, ((0, 0), (cfg.time_stride - 1, 0), (0, 0), (0, 0), (0, 0)))


def encode_rank(vae: VAE, frames: Frames, axis: str = SEQ) -> Latents:
    """On one rank, under `jax.shard_map`: its 4n frames of a video that is laid out and spread over
    `axis` → its n normalised latents, as in `vae.encode` of the whole video.
    """
    neighbour = Neighbour(axis, frames.shape[1] // vae.cfg.time_stride)
    return encode_stream(vae, _everywhere(neighbour), frames, first=False)[0]


def encode_sharded(vae: VAE, video: Frames, mesh: Mesh) -> Latents:
    """`vae.encode` on a mesh: the f normalised latents, spread over videos and over time.

    Raises ValueError where the frames do not fill whole latents, or there are not equally many for
    each rank.
    """
    _check_pieces(1 + (video.shape[1] - 1) // vae.cfg.time_stride, mesh.shape[SEQ])
    pieces = PartitionSpec(BATCH, SEQ)
    run = jax.shard_map(
        encode_rank, mesh=mesh, in_specs=(PartitionSpec(), pieces), out_specs=pieces
    )
    return run(vae, lay_out(vae.cfg, video))


def _everywhere(source: Any) -> VAECarry:
    """A carry that is the same for the first convolution, the layers and the last convolution."""
    return VAECarry((source,) * 3)


def _check_pieces(latents: int, ranks: int) -> None:
    if latents % ranks:
        raise InputError(f"{latents} latents cannot be shared equally among {ranks} ranks")


@dataclasses.dataclass(frozen=True)
class Window:
    """What one rank encodes by itself: frames [start, stop) of a video. The first `drop` latents
    that come of them are not its own; its own are [first, end).
    """

    first: int
    end: int
    start: int
    stop: int
    drop: int


def windows(latents: int, ranks: int, halo: int, time_stride: int = 4) -> tuple[Window, ...]:
    """The window of every rank, `halo` latents before its own included
    (`sp_training.py:SequenceParallelHelper.chunk_halo_metas`).

    An encoder takes the first frame it sees for a latent. Where that is not the video's first, it
    is the last frame of one latent more, which is dropped too.
    """
    _check_pieces(latents, ranks)
    count, found = latents // ranks, []
    for first in range(0, latents, count):
        begin, end = max(0, first - halo), first + count
        start, stop = max(0, time_stride * (begin - 1)), 1 + time_stride * (end - 1)
        found.append(Window(first, end, start, stop, first - begin + (begin > 0)))
    return tuple(found)


def encode_with_halo(vae: VAE, video: Frames, window: Window) -> Latents:
    """One rank's own latents from its window of a whole video; nothing is exchanged. They are those
    of `vae.encode` if the window's halo is at least `halo(vae.cfg)`.
    """
    return encode(vae, video[:, window.start : window.stop])[:, window.drop :]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A layer looks `frames` frames back, of `size` numbers each; a latent has `rate` of them."""

    frames: int
    rate: int
    size: int


@dataclasses.dataclass(frozen=True)
class Ledger:
    """In the place of a carry: writes down what every layer asks for. It stands for no frames but
    zeros, so it is for tracing only.
    """

    latents: int
    asked: list[Asked]


@before.register
def _(carry: Ledger, x: Video, frames: int) -> Video:
    size = x.size // x.shape[1]
    carry.asked.append(Asked(frames, x.shape[1] // carry.latents, size))
    return before(None, x, frames)


@functools.cache
def _asked(cfg: VAEConfig, height: int, width: int) -> tuple[Asked, ...]:
    """What the layers of the encoder ask for, in order, of one video. Nothing is allocated."""
    ledger = Ledger(1, [])

    def run(vae, frames):
        return encode_stream(vae, _everywhere(ledger), frames, first=False)[0]

    vae = nnx.eval_shape(lambda: VAE(cfg, rngs=nnx.Rngs(0)))
    jax.eval_shape(
        run, vae, jax.ShapeDtypeStruct((1, cfg.time_stride, height, width, 3), "float32")
    )
    return tuple(ledger.asked)


def halo(cfg: VAEConfig) -> int:
    """How many latents before its own a latent depends on: 28 in Wan 2.1 and 2.2, as many as their
    two residual blocks per level make (`scripts/compute_sp_vae_chunk_halo.py`).
    """
    layers = _asked(cfg, cfg.space_stride, cfg.space_stride)
    frames = sum(layer.frames * cfg.time_stride // layer.rate for layer in layers)
    return -(-frames // cfg.time_stride)


@dataclasses.dataclass(frozen=True)
class Part:
    """What one rank does: the latents that its encoder makes, dropped ones included; these as a
    share of the video's; the bytes that it gets from other ranks.
    """

    latents: int
    share: float
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Account:
    """What encoding one video costs, rank by rank. `balance` is the most latents of a rank over the
    mean: 1 where all are done at the same time.
    """

    ranks: tuple[Part, ...]
    balance: float


def accounts(
    cfg: VAEConfig, latents: int, ranks: int, *, height: int, width: int, dtype: Any = jnp.bfloat16
) -> dict[str, Account]:
    """Of both ways, "neighbour" and "halo", for one video of height × width pixels. Frames and
    activations are counted in `dtype`.

    With a halo a rank gets the frames of its window that are not its own, wherever they come from.
    """
    pixels, itemsize, n = height * width * 3, jnp.dtype(dtype).itemsize, latents // ranks
    asked = _asked(cfg, height, width)
    tails = [
        sum(min(layer.frames, rank * n * layer.rate) * layer.size for layer in asked)
        for rank in range(ranks)
    ]
    views = windows(latents, ranks, halo(cfg), cfg.time_stride)
    foreign = [max(0, view.stop - cfg.time_stride * n - view.start) * pixels for view in views]
    made = [n + view.drop for view in views]

    def account(made: list[int], numbers: list[int]) -> Account:
        parts = [
            Part(count, count / latents, amount * itemsize)
            for count, amount in zip(made, numbers, strict=True)
        ]
        return Account(tuple(parts), max(made) * ranks / sum(made))

    return {"neighbour": account([n] * ranks, tails), "halo": account(made, foreign)}
