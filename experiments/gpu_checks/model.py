"""`longlive bench` of a preset with random weights.

python -m gpu_checks.model RESULTS PRESET CHUNKS ENTRY…, an entry being "ATTENTION" or "ATTENTION,
switch": the backend of attention ("best" is the default), and whether the prompt changes half-way.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from longlive_kernels.attention.sink_window.api import BACKENDS

from gpu_checks import child
from longlive_jax import bench, bench_model, plan
from longlive_jax.errors import InputError


class RawWriter:
    """Writes frames as they are, where PyAV is missing. Used as `video.BackgroundWriter`."""

    def __init__(self, path: pathlib.Path, fps: int):
        self._file = path.open("wb")

    def __enter__(self) -> RawWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, frames: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(frames).data)


class Bench:
    """Benchmarks one model; its weights are drawn before the first measurement."""

    def __init__(self, preset: str, chunks: int):
        self.preset = preset
        self.chunks = chunks

    @functools.cached_property
    def model(self) -> Any:
        return bench_model.load(self.preset)

    def measure(self, entry: str) -> dict[str, Any]:
        attention, _, change = entry.partition(", ")
        if attention not in ("best", *BACKENDS):
            raise child.Skipped(f"there is no backend {attention}")
        if attention != "best" and jax.default_backend() == "cpu":
            raise child.Skipped("on a CPU it is the default")
        config = plan.PRESETS[self.preset]
        # The first chunk is as many frames shorter.
        frames = self.chunks * config.frames_per_chunk - (config.vae.time_stride - 1)
        seconds = frames / config.fps
        ask = plan.Ask(self.preset, seconds).check()
        try:
            bench_model.check_memory(ask, "generate", switches=bool(change))
        except InputError as error:
            raise child.Skipped(str(error)) from error
        model = self.model if attention == "best" else self.model.streaming(attention=attention)
        encoded = importlib.util.find_spec("av") is not None
        result = bench.run(
            model,
            seconds=seconds,
            repeat=1,
            seed=0,
            steps=None,
            change=change or "none",
            writer=None if encoded else RawWriter,
        )
        video = "H.264" if encoded else "raw frames: PyAV is missing"
        return {"video": video, "report": json.loads(result.to_json())}


if __name__ == "__main__":
    of_preset = Bench(sys.argv[2], int(sys.argv[3])).measure
    child.each(pathlib.Path(sys.argv[1]), sys.argv[4:], of_preset)
