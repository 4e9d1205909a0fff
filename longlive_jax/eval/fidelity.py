"""Is a model with fewer bits still the model it was? Its videos beside those of the same weights as
they are, from the same prompts and the same noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from longlive_jax.data.toy_world import Script
from longlive_jax.eval import drift
from longlive_jax.eval.toy import read
from longlive_jax.eval.toy_suite import (
    LAST,
    MINUTE,
    SHORT,
    Generate,
    Video,
    agreement,
    build,
    jobs,
)


@dataclasses.dataclass(frozen=True)
class Made:
    """Videos of a model and what they were asked to show: short ones, and ones of a minute."""

    scripts: tuple[Script, ...]
    short: tuple[Video, ...]
    long_scripts: tuple[Script, ...]
    long: tuple[Video, ...]


def make(generate: Generate, *, prompts: int, minutes: int, seed: int) -> Made:
    """The prompts of the toy suite of this seed, each video from a noise of its own."""
    suite = build(prompts=prompts, per_unseen=0, minutes=minutes, seed=seed)
    first = 1_000_000 * (seed + 1)
    short = tuple(generate(jobs(suite.prompts, SHORT, first)))
    long = tuple(generate(jobs(suite.minutes, MINUTE, first + prompts)))
    return Made(suite.prompts, short, suite.minutes, long)


def score(made: Made, original: Sequence[Video]) -> dict[str, Any]:
    """Fractions of short videos that are right at their end, drift of the long ones, and PSNR of
    the short ones to the `original` of each.
    """
    seen = [
        agreement(read(video[-LAST:]), script.segments[-1].scene)
        for script, video in zip(made.scripts, made.short, strict=True)
    ]
    right = {a: float(np.mean([hit[a] for hit in seen])) for a in drift.JUDGED}
    long = drift.score(made.long_scripts, made.long)
    return right | {
        "adherence": float(np.mean([all(hit[a] for a in drift.JUDGED) for hit in seen])),
        "right_at_60s": long["right_at_end"]["value"],
        "drift": long["drift"]["value"],
        "psnr": psnr(made.short, original),
    }


def psnr(videos: Sequence[Video], originals: Sequence[Video]) -> float:
    """The mean over videos in dB; two equal videos count as 99."""
    return float(np.mean([_psnr(*pair) for pair in zip(videos, originals, strict=True)]))


def _psnr(video: UInt8[np.ndarray, "t H W 3"], original: UInt8[np.ndarray, "t H W 3"]) -> float:
    error = np.mean((video.astype(np.float32) - original.astype(np.float32)) ** 2)
    return min(99.0, 10.0 * float(np.log10(255.0**2 / max(error, 1e-12))))
