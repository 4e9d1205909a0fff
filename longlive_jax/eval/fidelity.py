"""Two ways of running a model, side by side: do its videos still show what was asked, do they stay,
do they follow a switch, and how alike are they, from the same prompts and the same noise?
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from longlive_jax.data.toy_world import FPS, Script
from longlive_jax.eval import drift
from longlive_jax.eval.toy import read
from longlive_jax.eval.toy_suite import (
    LAST,
    LATENTS,
    MINUTE,
    SHORT,
    Generate,
    Video,
    agreement,
    build,
    jobs,
    switches,
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many videos: short ones, long ones of `seconds`, ones of a minute with switches."""

    prompts: int = 32
    long: int = 8
    seconds: float = 60.0
    switching: int = 0


@dataclasses.dataclass(frozen=True)
class Group:
    """Videos, and what they were asked to show."""

    scripts: tuple[Script, ...]
    videos: tuple[Video, ...]


@dataclasses.dataclass(frozen=True)
class Made:
    """The videos of a model."""

    short: Group
    long: Group
    switching: Group


def make(generate: Generate, sizes: Sizes, seed: int) -> Made:
    """The prompts of the toy suite of this seed, each video from a noise of its own."""
    most = max(sizes.long, sizes.switching)
    suite = build(prompts=sizes.prompts, per_unseen=0, minutes=most, seed=seed)
    chunks = round(sizes.seconds * FPS / (4 * LATENTS))
    asked = (
        (suite.prompts, SHORT),
        (suite.minutes[: sizes.long], chunks),
        (suite.switching[: sizes.switching], MINUTE),
    )
    groups, first = [], 1_000_000 * (seed + 1)
    for scripts, length in asked:
        groups.append(Group(scripts, tuple(generate(jobs(scripts, length, first)))))
        first += len(scripts)
    return Made(*groups)


def score(made: Made, originals: Sequence[Video] = ()) -> dict[str, Any]:
    """Fractions of short videos that are right at their end, drift of the long ones, fraction of
    switches that show in time; PSNR of the short ones to the `originals`, where there are any.
    """
    seen = [
        agreement(read(video[-LAST:]), script.segments[-1].scene)
        for script, video in zip(made.short.scripts, made.short.videos, strict=True)
    ]
    found = {a: float(np.mean([hit[a] for hit in seen])) for a in drift.JUDGED}
    found["adherence"] = float(np.mean([all(hit[a] for a in drift.JUDGED) for hit in seen]))
    if made.long.videos:
        long = drift.score(made.long.scripts, made.long.videos)
        found |= {"right_at_end": long["right_at_end"]["value"], "drift": long["drift"]["value"]}
        if "60.0" in long["drift_at"]:  # of longer ones, on the way
            found["drift_60s"] = long["drift_at"]["60.0"]
    if made.switching.videos:
        hits = switches(made.switching.scripts, made.switching.videos)
        found["switch_1s"] = float(np.mean([hit for _, hit in hits]))
    if len(originals):
        found["psnr"] = psnr(made.short.videos, originals)
    return found


def psnr(videos: Sequence[Video], originals: Sequence[Video]) -> float:
    """The mean over videos in dB; two equal videos count as 99."""
    return float(np.mean([_psnr(*pair) for pair in zip(videos, originals, strict=True)]))


def _psnr(video: UInt8[np.ndarray, "t H W 3"], original: UInt8[np.ndarray, "t H W 3"]) -> float:
    error = np.mean((video.astype(np.float32) - original.astype(np.float32)) ** 2)
    return min(99.0, 10.0 * float(np.log10(255.0**2 / max(error, 1e-12))))
