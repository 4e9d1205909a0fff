"""Frames of the shipped tiny model, in float32, compared with those of another device.

python -m gpu_checks.toy RESULTS FILE OTHER ENTRY…: "frames" generates them, with a switch
half-way, and stores them in FILE; "difference" compares them with those in OTHER.
"""

from __future__ import annotations

import functools
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import longlive_jax
from gpu_checks import child
from longlive_jax import report

PROMPTS = (
    "a red circle moves left over a black background",
    "a blue square bounces over a grey background",
)
CHUNKS = 2  # of each prompt
TOLERANCE = 1.0  # levels of 255, on average over a chunk: beyond it pictures differ


def measure(file: pathlib.Path, other: pathlib.Path, entry: str) -> dict[str, Any]:
    return frames(file) if entry == "frames" else difference(file, other)


def frames(file: pathlib.Path) -> dict[str, Any]:
    jax.config.update("jax_default_matmul_precision", "highest")
    start = time.perf_counter()
    session = longlive_jax.load("tiny", dtype=jnp.float32).session(PROMPTS[0])
    chunks = [session.next_chunk() for _ in range(CHUNKS)]
    session.switch(PROMPTS[1])
    chunks += [session.next_chunk() for _ in range(CHUNKS)]
    np.savez(file, *chunks)
    took = time.perf_counter() - start
    return {"device": report.device_name(), "chunks": len(chunks), "took_s": took}


def difference(file: pathlib.Path, other: pathlib.Path) -> dict[str, Any]:
    """Differences in levels of 255, by chunk."""
    for path in (file, other):
        if not path.exists():
            raise child.Skipped(f"there are no frames in {path.name}")
    with np.load(file) as mine, np.load(other) as theirs:
        pairs = [(mine[name].astype(np.int16), theirs[name].astype(np.int16)) for name in mine]
    off = [np.abs(one - two) for one, two in pairs]
    facts = {
        "largest": [int(x.max()) for x in off],
        "mean": [float(x.mean()) for x in off],
        "tolerance_of_mean": TOLERANCE,
    }
    if max(facts["mean"]) > TOLERANCE:
        raise child.Wrong("the frames differ", facts)
    return facts


if __name__ == "__main__":
    with_files = functools.partial(measure, *map(pathlib.Path, sys.argv[2:4]))
    child.each(pathlib.Path(sys.argv[1]), sys.argv[4:], with_files)
