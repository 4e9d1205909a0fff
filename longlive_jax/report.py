"""Speed, as every command reports it: one schema."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import sys
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from longlive_jax.version import __version__


@dataclasses.dataclass(frozen=True)
class Switch:
    """A change of prompt: when it was asked for, and the first frame that follows it."""

    prompt: str
    requested_s: float
    applied_s: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What was made and how fast. Warm-up is excluded from every rate and latency.

    `generate` counts its own first two chunks as warm-up (everything is compiled by then; one less
    where only two were made), `bench` a video of its own before the measured ones. Only
    `time_to_first_chunk_s` is taken where the video begins: in `generate` it includes compilation.
    """

    frames: int  # of the video; bench makes several of this length
    width: int
    height: int
    fps: int  # at which the video plays
    denoise_fps: float  # the transformer alone
    end_to_end_fps: float  # with text, VAE, and the file written and closed
    time_to_first_chunk_s: float  # from asking for a video to its first frames on the host
    chunk_latency_p50_s: float  # from asking for a chunk to its frames on the host
    chunk_latency_p95_s: float
    switches: tuple[Switch, ...]
    peak_memory_bytes: int  # of the device; on CPUs of the process
    compile_s: float
    device: str
    versions: dict[str, str]
    seed: int
    steps: int
    warmup_chunks: int

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def show(summary: Any, to_stderr: bool) -> None:
    """Prints a report as a table: a row for each number and each entry of its own tables."""
    table = Table("measure", "value", title=summary.device)
    for name, value in dataclasses.asdict(summary).items():
        parts = {f"{name}: {part}": inner for part, inner in _parts(value).items()}
        for label, inner in (parts or {name: value}).items():
            table.add_row(label, _words(inner))
    Console(stderr=to_stderr).print(table, markup=False)


def _parts(value: Any) -> dict[Any, Any]:
    """The entries of a table within the table; nothing of any other value."""
    of_rows = isinstance(value, dict) and all(isinstance(part, dict) for part in value.values())
    return value if of_rows else {}


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def peak_memory() -> int:
    """Bytes at the highest point until now: the device's, or on CPUs the process's."""
    stats = jax.devices()[0].memory_stats() or {}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return stats.get("peak_bytes_in_use", resident if sys.platform == "darwin" else resident * 1024)


def device_name() -> str:
    """Such as "NVIDIA H100 80GB HBM3 x 8" or "AMD EPYC 9B45, 2 cores"."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return f"{_processor()}, {os.cpu_count()} cores"
    count = f" x {len(devices)}" if len(devices) > 1 else ""
    return devices[0].device_kind + count


def versions() -> dict[str, str]:
    """Of everything that can change a number in a report."""
    installed = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "av")}
    return {"longlive_jax": __version__, "python": platform.python_version(), **installed}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.partition(":")[2].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
