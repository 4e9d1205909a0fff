"""Does a long video stay what it was? `longlive eval --suite drift`.

Videos of one prompt. The world wraps around and its light never changes, so the values that the
pixels of a few seconds have stay the same while their places do not. *drift* is how far the sorted
values of a channel over two seconds are from those of seconds 2 to 4, the mean absolute difference
in levels of 255: colours that fade, backgrounds that turn noisy, objects that grow or are lost all
add to it. Beside it the judge: *right* is whether colour, shape and motion are read as asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from longlive_jax.data.toy_world import FPS, Script, chunk_start, render
from longlive_jax.eval.toy import read
from longlive_jax.eval.toy_suite import (
    LAST,
    LATENTS,
    Generate,
    Reconstruct,
    Video,
    agreement,
    build,
    jobs,
    rate,
)

EVERY = 10  # seconds between two looks
JUDGED = ("colour", "shape", "motion")


def distance(some: UInt8[np.ndarray, "t H W 3"], others: UInt8[np.ndarray, "t H W 3"]) -> float:
    """Between the values that pixels have in as many frames, wherever they are (the Wasserstein
    distance of the channels' histograms), in levels.
    """

    def ordered(frames: np.ndarray) -> Float[np.ndarray, "n 3"]:
        return np.sort(frames.reshape(-1, 3), 0).astype(np.float32)

    return float(np.abs(ordered(some) - ordered(others)).mean())


def score(scripts: Sequence[Script], videos: Iterable[Video]) -> dict[str, Any]:
    """Of videos of one length: drift at their end and on the way, and how many are right."""
    drifts, first, last = [], [], []
    for script, video in zip(scripts, videos, strict=True):
        begin = video[LAST : 2 * LAST]
        ends = [*range(EVERY * FPS, len(video) - LAST, EVERY * FPS), len(video)]
        drifts.append([distance(begin, video[end - LAST : end]) for end in ends])
        for hits, part in ((first, begin), (last, video[-LAST:])):
            seen = agreement(read(part), script.segments[-1].scene)
            hits.append(all(seen[attribute] for attribute in JUDGED))
    seconds = [end / FPS for end in ends]
    return {
        "drift": _mean([drift[-1] for drift in drifts]),
        "drift_at": dict(zip(map(str, seconds), np.mean(drifts, 0).tolist(), strict=True)),
        "right_at_start": rate(first),
        "right_at_end": rate(last),
    }


def _mean(values: Sequence[float]) -> dict[str, float | int]:
    """With the normal 95 % interval of the mean."""
    half = 1.959964 * float(np.std(values, ddof=1)) / len(values) ** 0.5
    value = float(np.mean(values))
    return {"value": value, "low": value - half, "high": value + half, "n": len(values)}


def evaluate(
    generate: Generate,
    *,
    videos: int = 24,
    seconds: float = 60.0,
    seed: int = 0,
    reconstruct: Reconstruct | None = None,
) -> dict[str, Any]:
    """Scores a model on `videos` prompts, attributes stratified; `baselines` are the same numbers
    for rendered videos and, given `reconstruct`, for these through the VAE and back.
    """
    scripts = build(prompts=0, per_unseen=0, minutes=videos, seed=seed).minutes
    chunks = round(seconds * FPS / (4 * LATENTS))
    asked = jobs(scripts, chunks, 1_000_000 * (seed + 1))
    truth = [render(script, chunk_start(chunks, LATENTS)) for script in scripts]
    baselines = {"ground_truth": score(scripts, truth), "reconstruction": None}
    if reconstruct is not None:
        baselines["reconstruction"] = score(scripts, reconstruct(truth))
    return {**score(scripts, generate(asked)), "seconds": seconds, "baselines": baselines}
