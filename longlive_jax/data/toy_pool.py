"""Encoded videos of the toy world, and the training sequences cut from them.

A pool is made of shards: the latents of a few hundred whole videos, encoded as the streaming VAE
would. Scripts are not stored: they follow from the shard's seed.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from longlive_jax.config import StreamConfig
from longlive_jax.data import toy_world
from longlive_jax.data.caption import caption
from longlive_jax.events import CUT_PREFIX
from longlive_jax.train.teacher_forcing import Layout

Tokenizer = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    chunks: int = 16  # per video
    recipe: toy_world.Recipe = toy_world.Recipe(
        switch_rate=0.24, cut_rate=0.06, two_things_rate=0.06
    )


@dataclasses.dataclass(frozen=True)
class SequenceConfig:
    """How training sequences are cut from videos.

    A sequence at the start is the first chunks of a video. A later one is what the cache holds by
    then: the first chunk, a gap, and a run of chunks of which the last but one is where something
    happens. Hops, circles and switches of shape or motion are learned late: they are drawn more
    often.
    """

    start: Layout = Layout(clean=(0, 1), noisy=(0, 0, 0, 1, 2))
    later: Layout = Layout(clean=(0, 1, 2, 3), noisy=(3, 3, 3, 4, 4))
    start_share: float = 0.5  # the first chunk has only its prompt to go by
    event_share: float = (
        0.8  # of the later sequences have a switch or a cut at the last chunk but one
    )
    easy: float = 0.4  # of the sequences that show none of these are kept
    recache: float = (
        0.85  # of the switches: what came before is seen under the new prompt, as after a recache
    )
    full: float = 0.7  # of the sequences in which some noisy chunks would not count are dropped
    drop: float = 0.1  # of the sequences: no prompt, for guidance
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
    """Renders and encodes `videos` videos. encode: uint8 [b, t, H, W, 3] -> latents [b, f, h, w,
    c].
    """
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
class _Timeline:
    """What a streaming run of a script would have seen, chunk by chunk, up to its last chunk."""

    segment: list[int]  # in force at each chunk
    context: list[int]  # whose prompt each chunk is remembered under
    shot: list[int]
    since: int  # the first chunk that was made under this memory


def _replay(rng: np.random.Generator, script: toy_world.Script, chunks: int, recache: float):
    starts = {chunk: i for i, (chunk, _, _) in enumerate(script.events())}
    line = _Timeline([], [], [], 0)
    for c in range(chunks):
        segment = starts.get(c, line.segment[-1] if c else 0)
        kind = script.segments[segment].kind if c in starts else ""
        shot = (line.shot[-1] if c else 0) + (kind == "cut")
        context, since = line.context, line.since
        if kind == "switch" and rng.random() < recache:
            context, since = [segment] * c, c
        line = _Timeline([*line.segment, segment], [*context, segment], [*line.shot, shot], since)
    return line


def _choose(rng, script: toy_world.Script, total: int, cfg: SequenceConfig, start: bool):
    """The chunks of a sequence."""
    n = 1 + max((cfg.start if start else cfg.later).noisy)
    if start:
        return list(range(n))
    first = range(1, total - n + 2)
    happens = [chunk - n + 3 for chunk, kind, _ in script.events() if kind != "start"]
    happens = [f for f in happens if f in first]
    if happens and rng.random() < cfg.event_share:
        first = happens
    f = int(first[rng.integers(len(first))])
    return [0, *range(f, f + n - 1)]


def _cut(rng, script, total: int, cfg: SequenceConfig, start: bool, stream: StreamConfig):
    """One training sequence of a script, or None where its prompts are too many or nothing is left
    to learn.
    """
    chunks = _choose(rng, script, total, cfg, start)
    line = _replay(rng, script, chunks[-1] + 1, cfg.recache)
    layout = cfg.start if start else cfg.later
    weight = [float(chunks[c] >= line.since) for c in layout.noisy]
    if not _hard(script, line.segment, chunks) and rng.random() >= cfg.easy:
        return None
    used = sorted({line.segment[c] for c in chunks} | {line.context[c] for c in chunks})
    idle = not all(weight) and rng.random() < cfg.full
    if len(used) > cfg.prompts or idle or not any(weight):
        return None
    stretch = not start and rng.random() < cfg.far
    gap = int(np.exp(rng.uniform(0, np.log(cfg.reach)))) if stretch else 0
    position = [
        stream.chunk * c + n + stream.shot_offset * line.shot[c] + gap * (i > 0)
        for i, c in enumerate(chunks)
        for n in range(stream.chunk)
    ]
    fields = dict(
        position=np.array(position, np.float32),
        clean_prompt=np.array([used.index(line.context[c]) for c in chunks], np.int32),
        noisy_prompt=np.array([used.index(line.segment[c]) for c in chunks], np.int32),
        weight=np.array(weight, np.float32),
    )
    return chunks, [script.segments[s] for s in used], fields


def _hard(script: toy_world.Script, segment: list[int], chunks: list[int]) -> bool:
    """Whether anything hops or circles, or changes its shape or motion, in a sequence's chunks."""
    segments = [script.segments[i] for i in sorted({segment[c] for c in chunks})]
    things = [s.scene.things for s in segments]
    swings = any(t.motion in ("bounces", "circles") for held in things for t in held)
    form = [[(t.shape, t.motion) for t in held] for held in things]
    return swings or any(
        after.kind == "switch" and form[i] != form[i + 1] for i, after in enumerate(segments[1:])
    )


def sample(
    rng: np.random.Generator,
    pool: Pool,
    tokenizer: Tokenizer,
    batch: int,
    cfg: SequenceConfig,
    stream: StreamConfig,
) -> tuple[Layout, dict[str, np.ndarray]]:
    """A batch of sequences of one kind: its layout, and the fields of a `teacher_forcing.Batch`."""
    total = pool.latents.shape[1] // stream.chunk
    start = rng.random() < cfg.start_share
    rows, texts = [], []
    while len(rows) < batch:
        v = int(rng.integers(len(pool.scripts)))
        cut = _cut(rng, pool.scripts[v], total, cfg, start, stream)
        if cut is None:
            continue
        chunks, segments, fields = cut
        frames = np.concatenate([np.arange(stream.chunk) + stream.chunk * c for c in chunks])
        rows.append(fields | dict(latents=pool.latents[v, frames].astype(np.float32)))
        said = [""] * len(segments) if rng.random() < cfg.drop else [_say(rng, s) for s in segments]
        texts += said + [""] * (cfg.prompts - len(said))
    ids = tokenizer(texts)[0].reshape(batch, cfg.prompts, -1)
    fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return (cfg.start if start else cfg.later), fields | {"ids": ids}


def _say(rng: np.random.Generator, segment: toy_world.Segment) -> str:
    text = caption(segment.scene, rng if rng.random() < 0.5 else None)
    return CUT_PREFIX + text if segment.kind == "cut" else text
