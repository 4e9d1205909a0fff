"""Encoded videos of the toy world, and the training sequences cut from them.

A pool is made of shards: the latents of a few hundred whole videos, encoded as the streaming VAE would. Scripts are not
stored: they follow from the shard's seed.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from longlive_jax.config import StreamConfig
from longlive_jax.data import toy_world
from longlive_jax.data.caption import CUT_PREFIX, caption

Tokenizer = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    chunks: int = 24  # per video
    recipe: toy_world.Recipe = toy_world.Recipe(
        switch_rate=0.2, cut_rate=0.06, two_things_rate=0.06
    )


@dataclasses.dataclass(frozen=True)
class SequenceConfig:
    """How training sequences are cut from videos."""

    chunks: int = 5
    start_share: float = 0.5  # begin at frame 0; the others are [first chunk, a gap, the rest], as the cache is later
    recache: float = 0.75  # of the switches: the chunks before it are seen under the new prompt, as after a recache
    drop: float = 0.08  # of the sequences: no prompt, for guidance
    far: float = 0.5  # of the gaps are stretched, up to `reach` latent frames
    reach: int = 1000
    prompts: int = 3  # at most, in one sequence


@dataclasses.dataclass(frozen=True)
class Pool:
    latents: np.ndarray  # v f h w c
    scripts: list[toy_world.Script]


def scripts(seed: int, videos: int, cfg: PoolConfig) -> list[toy_world.Script]:
    rng = np.random.default_rng(seed)
    return [toy_world.random_script(rng, cfg.chunks, cfg.recipe) for _ in range(videos)]


def write_shard(
    path: pathlib.Path, seed: int, videos: int, encode: Callable, cfg: PoolConfig, batch: int = 8
) -> None:
    """Renders and encodes `videos` videos. encode: uint8 [b, t, H, W, 3] -> latents [b, f, h, w, c]."""
    frames = toy_world.chunk_start(cfg.chunks, cfg.recipe.latents)
    made = scripts(seed, videos, cfg)
    groups = [made[i : i + batch] for i in range(0, videos, batch)]
    latents = [encode(np.stack([toy_world.render(s, frames) for s in g])) for g in groups]
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, latents=np.concatenate(latents).astype(np.float16), seed=seed)
    partial.replace(path)


def read(paths: Sequence[pathlib.Path], cfg: PoolConfig) -> Pool:
    latents, made = [], []
    for path in paths:
        with np.load(path) as shard:
            latents.append(shard["latents"])
            made += scripts(int(shard["seed"]), len(latents[-1]), cfg)
    return Pool(np.concatenate(latents), made)


@dataclasses.dataclass(frozen=True)
class _Sequence:
    chunks: list[int]
    segment: list[int]  # of each chunk; its prompt when it is denoised
    context: list[int]  # the segment whose prompt a chunk is seen under, once clean
    position: np.ndarray  # temporal RoPE position of each latent frame
    weight: list[float]


def _cut(rng, script: toy_world.Script, cfg: SequenceConfig, total: int, stream: StreamConfig):
    """One training sequence of a video, with the prompts that a streaming run would have had."""
    whole = rng.random() < cfg.start_share
    first = int(rng.integers(1, total - cfg.chunks + 2))
    rest = range(first, first + cfg.chunks - 1)
    chunks = list(range(cfg.chunks)) if whole else [0, *rest]
    begins = {-(-s.start // (4 * stream.chunk)): i for i, s in enumerate(script.segments)}
    segment, context, shot, shots, since = 0, [], 0, [], 0
    of_chunk = []
    for c in range(chunks[-1] + 1):
        segment = begins.get(c, segment)
        kind = script.segments[segment].kind if c in begins else ""
        shot += kind == "cut"
        if kind == "switch" and rng.random() < cfg.recache:
            context, since = [segment] * c, c
        context.append(segment)
        of_chunk.append(segment)
        shots.append(shot)
    gap = 0
    if not whole and rng.random() < cfg.far:
        gap = int(np.exp(rng.uniform(0, np.log(cfg.reach))))
    position = [
        stream.chunk * c + n + stream.shot_offset * shots[c] + (gap if i else 0)
        for i, c in enumerate(chunks)
        for n in range(stream.chunk)
    ]
    weight = [
        float(c >= since and (whole or i > 1 or first == 1 and i)) for i, c in enumerate(chunks)
    ]
    pick = lambda x: [x[c] for c in chunks]  # noqa: E731
    return _Sequence(chunks, pick(of_chunk), pick(context), np.array(position, np.float32), weight)


def sample(
    rng: np.random.Generator,
    pool: Pool,
    tokenizer: Tokenizer,
    batch: int,
    cfg: SequenceConfig,
    stream: StreamConfig,
) -> dict[str, np.ndarray]:
    """The fields of a `teacher_forcing.Batch`."""
    total = pool.latents.shape[1] // stream.chunk
    rows, texts = [], []
    while len(rows) < batch:
        v = int(rng.integers(len(pool.scripts)))
        script = pool.scripts[v]
        cut = _cut(rng, script, cfg, total, stream)
        used = sorted({*cut.segment, *cut.context})
        if len(used) > cfg.prompts or not any(cut.weight):
            continue
        frames = np.concatenate([np.arange(stream.chunk) + stream.chunk * c for c in cut.chunks])
        rows.append(
            dict(
                latents=pool.latents[v, frames].astype(np.float32),
                position=cut.position,
                clean_prompt=np.array([used.index(s) for s in cut.context], np.int32),
                noisy_prompt=np.array([used.index(s) for s in cut.segment], np.int32),
                weight=np.array(cut.weight, np.float32),
            )
        )
        said = [_say(rng, script.segments[s]) for s in used]
        said = [""] * len(said) if rng.random() < cfg.drop else said
        texts += said + [""] * (cfg.prompts - len(said))
    ids = tokenizer(texts)[0]
    fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return fields | {"ids": ids.reshape(batch, cfg.prompts, -1)}


def _say(rng: np.random.Generator, segment: toy_world.Segment) -> str:
    text = caption(segment.scene, rng if rng.random() < 0.5 else None)
    return CUT_PREFIX + text if segment.kind == "cut" else text
