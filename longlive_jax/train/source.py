"""From a folder of videos to what a training step takes: frames are encoded on the devices that
hold them, prompts once.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from longlive_jax import sharding
from longlive_jax.data import montage
from longlive_jax.data.latents import LatentCache, Shelf
from longlive_jax.data.pipeline import Batch, Batches, PipelineConfig
from longlive_jax.errors import InputError
from longlive_jax.model import Model
from longlive_jax.train.ar import Videos
from longlive_jax.vae.sharded import encode_rank
from longlive_jax.vae.vae import VAE, encode


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Which videos, and how many of them. cache: a folder for latents, which are then encoded
    once.
    """

    folder: str
    chunks: int  # of a sequence
    batch: int  # sequences that the devices work on together
    parts: int = 1  # batches whose gradients are added up to a step
    prompts: int = 0  # different ones in a sequence, at most; 0 is one for each chunk
    shot: int = 0  # chunks after which a shot is cut, 0 is never
    pad: bool = True  # a sample that is too short is padded; the padding is not in the loss
    start: str = "anywhere"
    cache: str = ""
    seed: int = 0
    workers: int = 0


class Source:
    """Endless steps of encoded videos. As of a Grain iterator, its position can be kept.

    Args:
      model: Whose VAE and text encoder make latents and embeddings; neither is trained.
      cfg: What to read.
      mesh: Where it goes.
    """

    def __init__(self, model: Model, cfg: SourceConfig, mesh: Mesh):
        self.model, self.cfg, self.mesh = model, cfg, mesh
        config = model.config
        first, last = _own_rows(mesh, cfg.batch)
        share = last - first
        pipeline = PipelineConfig(
            montage.for_model(config, cfg.chunks, shot=cfg.shot, pad=cfg.pad),
            config.height,
            config.width,
            batch=cfg.parts * share,
            seed=cfg.seed,
            start=cfg.start,
            workers=cfg.workers,
        )
        # Readers take turns in the order of the samples. A process with some of the rows has one
        # for each, so that a row is the same sample however many processes there are.
        readers = [pipeline]
        if share < cfg.batch:
            row = dict(batch=cfg.parts, ranks=cfg.batch, workers=-(-cfg.workers // share))
            readers = [dataclasses.replace(pipeline, rank=r, **row) for r in range(first, last)]
        cache = None
        if cfg.cache:
            shelf = Shelf(pathlib.Path(cfg.cache), model.vae_fingerprint)
            cache = LatentCache(shelf, self._encode_alone)
        self.readers = [Batches(pathlib.Path(cfg.folder), reader, cache) for reader in readers]
        self._said = functools.lru_cache(4096)(self._embed)

    def __next__(self) -> Videos:
        """Videos in parts, on their devices."""
        cfg, batch = self.cfg, _joined([next(reader) for reader in self.readers], self.cfg.parts)
        own = [_indexed(prompts, cfg.prompts or cfg.chunks) for prompts in batch.prompts]
        frames = self.cfg.chunks * self.model.config.stream.chunk
        valid = np.arange(frames) < batch.valid[:, None]
        context = np.stack([np.stack([self._said(p) for p in prompts]) for prompts, _ in own])
        prompt = np.array([index for _, index in own], np.int32)
        cached = batch.video.dtype != np.uint8
        latents = self._put(batch.video, True) if cached else self._encode(batch.video)
        return Videos(
            latents=latents,
            context=self._put(context, False),
            prompt=self._put(prompt, True),
            valid=self._put(valid.astype(np.float32), True),
        )

    def get_state(self) -> dict[str, Any]:
        return self.readers[0].get_state()  # the same of all

    def set_state(self, state: dict[str, Any]) -> None:
        for reader in self.readers:
            reader.set_state(state)

    def close(self) -> None:
        """Ends the workers."""
        for reader in self.readers:
            reader.close()

    def _put(self, x: np.ndarray, spread: bool) -> Array:
        """This process's rows of an array as part of the whole, parts b …"""
        x = x.reshape(self.cfg.parts, -1, *x.shape[1:])
        spec = PartitionSpec(None, sharding.BATCH, sharding.SEQ if spread else None)
        shape = (x.shape[0], self.cfg.batch, *x.shape[2:])
        first, _ = _own_rows(self.mesh, self.cfg.batch)

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[1].indices(self.cfg.batch)
            return x[(index[0], slice(start - first, stop - first), *index[2:])]

        return jax.make_array_from_callback(shape, NamedSharding(self.mesh, spec), piece)

    def _encode(self, frames: UInt8[np.ndarray, "b t H W 3"]) -> Float[Array, "parts own f h w c"]:
        blank = self.model.config.vae.time_stride - 1
        frames = np.pad(frames, ((0, 0), (blank, 0), (0, 0), (0, 0), (0, 0)))  # `lay_out`, in bytes
        return _encode(self.model.vae, self._put(frames, True), self.mesh)

    def _encode_alone(self, frames: UInt8[np.ndarray, "1 t H W 3"]) -> np.ndarray:
        return np.asarray(_encode_whole(self.model.vae, frames))

    def _embed(self, prompt: str) -> np.ndarray:
        return np.asarray(self.model.text([prompt])[0], np.float32)


def check(cfg: SourceConfig, mesh: Mesh) -> None:
    """Raises InputError where the videos of a step do not divide over the devices."""
    share = mesh.shape[sharding.DATA] * mesh.shape[sharding.FSDP]
    if cfg.batch % share:
        raise InputError(
            f"a batch of {cfg.batch} sequences does not divide over {share} groups of devices"
            f" (data x fsdp): it must be a multiple of {share}"
        )
    if not pathlib.Path(cfg.folder).is_dir():
        raise InputError(f"there is no folder of videos {cfg.folder}")


def _own_rows(mesh: Mesh, batch: int) -> tuple[int, int]:
    """First and last (exclusive) row of a batch that this process's devices hold."""
    spread = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    rows = [
        index[0].indices(batch)
        for index in spread.addressable_devices_indices_map((batch,)).values()
    ]
    return min(start for start, _, _ in rows), max(stop for _, stop, _ in rows)


def _joined(batches: list[Batch], parts: int) -> Batch:
    """Batches of several readers, each in parts, as one in parts."""
    whole = [x for batch in batches for x in batch.samples]
    order = np.arange(len(whole)).reshape(len(batches), parts, -1).swapaxes(0, 1).reshape(-1)
    prompts = [x for batch in batches for x in batch.prompts]
    return Batch(
        samples=tuple(whole[i] for i in order),
        prompts=tuple(prompts[i] for i in order),
        valid=np.concatenate([batch.valid for batch in batches])[order],
        video=np.concatenate([batch.video for batch in batches])[order],
    )


def _indexed(prompts: Sequence[str], most: int) -> tuple[list[str], list[int]]:
    """Different prompts, filled up to `most`, and which of them each chunk is under."""
    different = list(dict.fromkeys(prompts))
    if len(different) > most:
        raise InputError(
            f"a sequence has {len(different)} different prompts, more than prompts={most}"
        )
    return different + [""] * (most - len(different)), [different.index(p) for p in prompts]


@functools.partial(jax.jit, static_argnums=2)
def _encode(vae: VAE, frames: Array, mesh: Mesh) -> Array:
    pieces = PartitionSpec(sharding.BATCH, sharding.SEQ)

    def local(vae: VAE, frames: Array) -> Array:
        return encode_rank(vae, frames.astype(jnp.float32) / 127.5 - 1.0)

    run = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), pieces), out_specs=pieces)
    return jax.lax.map(functools.partial(run, vae), frames)  # parts b f h w c


@jax.jit
def _encode_whole(vae: VAE, frames: UInt8[Array, "b t H W 3"]) -> Array:
    return encode(vae, frames.astype(jnp.float32) / 127.5 - 1.0)
