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
    preset, source = entry.split(", ")
    if source == "compiled" and not footprint.toolchain():
        raise child.Skipped("the compiler for GPUs is not installed")
    made = plan.make(plan.Ask(preset, SECONDS, _gpu(device), source=source).check())
    text = made.memory.weights.text
    return {
        # With random weights no text encoder is there.
        "expected_bytes": made.memory.peak(switch=False) - text,
        "expected_bytes_with_switch": made.memory.peak(switch=True) - text,
        "plan": json.loads(made.to_json()),
    }


def _gpu(device: str) -> str:
    """The plan's name of the GPU; where it has none its default, whose size the formula ignores."""
    found = device.lower().replace(" ", "")
    return next((name for name in gpus.GPUS if name in found), plan.Ask("tiny", 1.0).gpu)


if __name__ == "__main__":
    wanted = functools.partial(measure, sys.argv[2])
    child.each(pathlib.Path(sys.argv[1]), sys.argv[3:], wanted)
