"""Latents of training sequences on disk, so that a sequence is decoded and encoded once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Shaped

from longlive_jax import output
from longlive_jax.convert import source
from longlive_jax.data.folder import Sample, reading
from longlive_jax.data.montage import MontageConfig, Plan
from longlive_jax.errors import InputError

NAME = "latents"  # of the tensor in a file
Latents = Shaped[np.ndarray, "f h w c"]


@dataclasses.dataclass(frozen=True)
class Shelf:
    """A folder of latents: a safetensors file for each sample and plan."""

    folder: pathlib.Path
    fingerprint: str  # of the VAE: latents of another one are not taken for its own

    def place(
        self, sample: Sample, plan: Plan, cfg: MontageConfig, height: int, width: int
    ) -> pathlib.Path:
        """Where a sequence's latents are, or would be.

        The name tells apart everything that they depend on: the files, their sizes and when they
        were changed, the frames read of them, the size in pixels and the VAE.
        """
        used = {window.file for window in plan.windows}
        with reading(self.folder):
            stats = {video.name: os.stat(video) for video in sample.videos if video.name in used}
        facts = {
            "files": sorted([name, s.st_size, s.st_mtime_ns] for name, s in stats.items()),
            "windows": [dataclasses.astuple(window) for window in plan.windows],
            "frames": [cfg.frames, cfg.fps, height, width],
            "vae": self.fingerprint,
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{sample.name}-{digest[:16]}.safetensors"

    def read(self, place: pathlib.Path) -> Latents | None:
        """The latents, or None where there are none that can be used."""
        try:
            return source.open_checkpoint(place).groups[""].get(NAME)
        except InputError:
            return None

    def write(self, place: pathlib.Path, latents: Latents) -> None:
        """Writes them whole or not at all, also where another process writes the same.

        Raises:
          InputError: the disk is full, or the folder cannot be written.
        """
        from longlive_jax import weights  # imports Flax, without which workers start sooner

        with output.writing(place):
            weights.save(place, {NAME: latents})


@dataclasses.dataclass(frozen=True)
class LatentCache:
    """What makes latents, and where they are kept.

    encode: frames, uint8 [b t H W 3], to latents [b f h w c]; called with one sequence at a time.
    """

    shelf: Shelf
    encode: Callable[[np.ndarray], Any]

    def fill(self, place: pathlib.Path, frames: np.ndarray) -> Latents:
        """Encodes a sequence's frames and keeps what comes out."""
        kept = self.shelf.read(place)  # it may have been written since the frames were read ahead
        if kept is not None:
            return kept
        latents = np.asarray(self.encode(frames[None]))[0]
        self.shelf.write(place, latents)
        return latents
