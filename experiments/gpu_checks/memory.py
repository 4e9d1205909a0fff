"""`longlive plan` of what `gpu_checks.model` measures.

python -m gpu_checks.memory RESULTS DEVICE ENTRY…, an entry being "PRESET, SOURCE": where the bytes
of activations come from, "formula" or "compiled". DEVICE is JAX's name of the GPU.
"""

from __future__ import annotations

import functools
import json
import pathlib
import sys
from typing import Any

from gpu_checks import child
from longlive_jax import footprint, gpus, plan

SECONDS = 10.0  # of the video; memory does not grow with it


def measure(device: str, entry: str) -> dict[str, Any]:
    """Plans the memory of a preset."""
    preset, source = entry.split(", ")
    if source == "compiled" and not footprint.toolchain():
        raise child.Skipped("the compiler for GPUs is not installed")
    planned = plan.make(plan.Ask(preset, SECONDS, _gpu(device), source=source).check())
    text = planned.memory.weights.text
    return {
        # A model with random weights has no text encoder.
        "expected_bytes": planned.memory.peak(switch=False) - text,
        "expected_bytes_with_switch": planned.memory.peak(switch=True) - text,
        "plan": json.loads(planned.to_json()),
    }


def _gpu(device: str) -> str:
    """The name of the GPU in `plan`; its default where it knows none (the formula ignores it)."""
    compact = device.lower().replace(" ", "")
    return next((name for name in gpus.GPUS if name in compact), plan.Ask("tiny", 1.0).gpu)


if __name__ == "__main__":
    on_device = functools.partial(measure, sys.argv[2])
    child.each(pathlib.Path(sys.argv[1]), sys.argv[3:], on_device)
