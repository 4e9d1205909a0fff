"""Sequences to make, from a file of prompts: no videos are needed to distil.

A line is a prompt, or a JSON list of them: the shots of a video, or what it is switched to. Or all
are objects with "prompts", such a list, and "image", the picture that the video begins with: a path
from where the file is.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from longlive_jax import documents, opening, sharding
from longlive_jax.errors import InputError
from longlive_jax.model import Model
from longlive_jax.train.sequence import Plot

LARGEST = 1 << 30  # bytes of a file of prompts: a million of them take 0.3 GB


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Which prompts, and how sequences of `chunks` are made of them.

    batch: sequences at a time. shot: chunks of a shot, each with the next prompt of a line; 0 is
    none. switch: first and last chunk at which a line's second prompt may take the place of the
    first, and how many chunks lie between two of those, drawn evenly; None is never. file: one
    prompt a line.
    """

    file: str
    chunks: int
    batch: int
    shot: int = 0
    switch: tuple[int, int, int] | None = None
    seed: int = 0

    def __post_init__(self):
        if self.shot and self.switch is not None:
            raise ValueError("a sequence has shots or a switch, not both")
        if self.switch is not None:
            if len(self.switch) != 3:
                raise ValueError(f"a switch is at chunks (first, last, apart), not {self.switch}")
            first, last, apart = self.switch
            if not 0 < first <= last < self.chunks or apart < 1:
                raise ValueError(
                    f"a switch at one of chunks {first} to {last}, {apart} apart, is not within a"
                    f" sequence of {self.chunks}"
                )

    @property
    def switches(self) -> range:
        """Chunks at which the prompt may change."""
        if self.switch is None:
            return range(0)
        first, last, apart = self.switch
        return range(first, last + 1, apart)

    @property
    def most(self) -> int:
        """Prompts of a sequence."""
        return 2 if self.switch is not None else -(-self.chunks // self.shot) if self.shot else 1


@dataclasses.dataclass(frozen=True)
class Line:
    """What one sequence is made of."""

    prompts: list[str]
    image: pathlib.Path | None = None


def read(path: pathlib.Path) -> list[Line]:
    """The lines of a file. Raises InputError for a file, or a line, that cannot be read."""
    try:
        lines = [line.strip() for line in documents.read_text(path, limit=LARGEST).splitlines()]
    except (OSError, InputError) as error:
        raise InputError(f"the prompts in {path} cannot be read: {error}") from error
    found = [_line(path, i, line) for i, line in enumerate(lines, 1) if line]
    if not found:
        raise InputError(f"{path} has no prompts")
    if 0 < sum(line.image is None for line in found) < len(found):
        raise InputError(f"{path} has lines with a picture, and lines without one")
    return found


def _line(path: pathlib.Path, number: int, line: str) -> Line:
    if line[0] not in "[{":
        return Line([line])
    try:
        told = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}, line {number}: {error}") from error
    image, prompts = None, told
    if isinstance(told, dict):
        if told.keys() != {"prompts", "image"} or not isinstance(told["image"], str):
            raise InputError(f'{path}, line {number} is no object of "prompts" and "image"')
        image, prompts = path.parent / told["image"], told["prompts"]
        if not image.is_file():
            raise InputError(f"{path}, line {number}: there is no picture {image}")
    listed = isinstance(prompts, list) and prompts
    if not listed or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise InputError(f"{path}, line {number} is no list of prompts")
    return Line(prompts, image)


class Prompts:
    """Endless batches of sequences, in an order that the seed decides. As of a Grain iterator, the
    position can be kept.

    Raises InputError where a switch is asked for and a line has only one prompt.
    """

    def __init__(self, model: Model, cfg: PromptConfig, mesh: Mesh):
        self.cfg, self.mesh, self.taken = cfg, mesh, 0
        lines = read(pathlib.Path(cfg.file))
        short = [i for i, line in enumerate(lines, 1) if len(line.prompts) < 2]
        if cfg.switch is not None and short:
            raise InputError(f"{cfg.file}, line {short[0]} has no prompt to switch to")
        share = mesh.shape[sharding.DATA] * mesh.shape[sharding.FSDP]
        if cfg.batch % share:
            raise InputError(
                f"a batch of {cfg.batch} sequences does not divide over {share} groups of devices"
                f" (data x fsdp): it must be a multiple of {share}"
            )
        self.lines = grain.MapDataset.source(lines).shuffle(cfg.seed).repeat()
        self._said = functools.lru_cache(4096)(
            lambda prompt: np.asarray(model.text([prompt])[0], np.float32)
        )
        self._seen = functools.lru_cache(4096)(
            lambda image: np.asarray(opening.picture(model, image)[0][0], np.float32)
        )

    def __next__(self) -> Plot:
        cfg = self.cfg
        numbers = range(self.taken, self.taken + cfg.batch)
        rows, images = [self._row(i) for i in numbers], [self.lines[i].image for i in numbers]
        self.taken += cfg.batch
        prompts, *parts = zip(*rows, strict=True)
        context = np.stack([np.stack([self._said(p) for p in row]) for row in prompts])
        negative = np.broadcast_to(self._said(""), (cfg.batch, *context.shape[2:]))
        told = map(self._put, (context, negative, *map(np.stack, parts)))
        given = None if images[0] is None else self._put(np.stack([*map(self._seen, images)]))
        return Plot(*told, given)

    def get_state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]

    def _row(self, number: int) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
        """Prompts, and for every chunk which of them, whether it is cut, whether switched."""
        cfg, line = self.cfg, self.lines[number].prompts
        chunk = np.arange(cfg.chunks)
        prompt, cut, switch = (np.zeros(cfg.chunks, kind) for kind in (np.int32, bool, bool))
        if cfg.shot:
            prompt = np.minimum(chunk // cfg.shot, len(line) - 1).astype(np.int32)
            cut[1:] = prompt[1:] != prompt[:-1]
        elif cfg.switch is not None:
            drawn = np.random.default_rng((cfg.seed, number)).integers(len(cfg.switches))
            at = cfg.switches[drawn]
            prompt, switch = (chunk >= at).astype(np.int32), chunk == at
        used = line[: cfg.most]
        return used + used[-1:] * (cfg.most - len(used)), prompt, cut, switch

    def _put(self, x: np.ndarray) -> Array:
        place = NamedSharding(self.mesh, PartitionSpec(sharding.BATCH))
        return jax.make_array_from_callback(x.shape, place, lambda index: jnp.asarray(x[index]))
