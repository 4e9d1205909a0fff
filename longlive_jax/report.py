"""Speed, as every command reports it: one schema."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import resource
import shlex
import sys
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from longlive_jax.version import __version__

WIDTH = 140  # of tables that go to a file


@dataclasses.dataclass(frozen=True)
class Switch:
    """A change of prompt: when it was asked for, and the first frame that follows it."""

    prompt: str
    requested_s: float
    applied_s: float


@dataclasses.dataclass(frozen=True)
class Head:
    """What every report says first: what was measured, where, and by which command."""

    suite: str  # "generate", "session", "train", "vae" or "kernels"
    model: str  # its name; empty where kernels alone are measured
    weights: str  # what was loaded, or that they are random
    seed: int
    device: str
    versions: dict[str, str]
    command: str  # that started this process

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def tables(self) -> list[Table]:
        """What `show` prints: a row for each number and each entry of its own tables."""
        table = Table("measure", "value", title=self.device)
        for name, value in dataclasses.asdict(self).items():
            parts = {f"{name}: {part}": inner for part, inner in _parts(value).items()}
            for label, inner in (parts or {name: value}).items():
                table.add_row(label, _words(inner))
        return [table]


def head(suite: str, model: Any, seed: int) -> dict[str, Any]:
    """The fields of `Head`, as keywords. model: what `longlive_jax.load` returns, or None."""
    return dict(
        suite=suite,
        model="" if model is None else model.config.name,
        weights="" if model is None else model.origin.name,
        seed=seed,
        device=device_name(),
        versions=versions(),
        command=command(),
    )


@dataclasses.dataclass(frozen=True)
class Report(Head):
    """What was made and how fast. Warm-up is excluded from every rate and latency.

    `generate` counts its own first two chunks as warm-up (everything is compiled by then; one less
    where only two were made), `bench` a video of its own before the measured ones. Only
    `time_to_first_chunk_s` is taken where the video begins: in `generate` it includes compilation.
    """

    frames: int  # of the video; bench makes several of this length
    width: int
    height: int
    fps: int  # at which the video plays
    # The transformer; in `bench` alone, in `generate` while the chunk before is being decoded.
    denoise_fps: float
    end_to_end_fps: float  # with text, VAE, and the file written and closed
    time_to_first_chunk_s: float  # from asking for a video to its first frames on the host
    chunk_latency_p50_s: float  # from asking for a chunk to its frames on the host
    chunk_latency_p95_s: float
    switches: tuple[Switch, ...]
    peak_memory_bytes: int  # of the device; on CPUs of the process
    compile_s: float
    steps: int
    clean_pass: bool  # a forward more for each chunk
    warmup_chunks: int
    window: int  # latent frames
    chunk_flops: float  # of one chunk with the window full, a clean pass included
    ceiling_fps: float | None  # denoise_fps at the GPU's bf16 peak; None where that is not known
    of_ceiling: float | None  # denoise_fps / ceiling_fps
    # What was done to pictures that came in, and what of prompts the model does not read.
    notes: tuple[str, ...] = ()


def show(summary: Head, to_stderr: bool) -> None:
    """Prints the tables of a report."""
    console = Console(stderr=to_stderr)
    if not console.is_terminal:
        console.width = WIDTH
    for table in summary.tables():
        console.print(table, markup=False)


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


def free_memory() -> int:
    """Bytes that may still be taken: of the device, or on CPUs of the machine."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        told = pathlib.Path("/proc/meminfo").read_text("utf-8")
        return int(re.search(r"MemAvailable: *(\d+) kB", told)[1]) * 1024
    except (OSError, TypeError):  # another system
        return os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()


def check_room(program: jax.stages.Compiled) -> int:
    """Bytes that a program takes beside its arguments.

    Raises MemoryError where there is no room for them.
    """
    memory = program.memory_analysis()
    need = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    if need > free_memory():
        raise MemoryError(f"needs {need / 1e9:.2f} GB, and {free_memory() / 1e9:.2f} GB are free")
    return memory.temp_size_in_bytes


def command() -> str:
    """What this process was started with, without the folder that the program lies in."""
    return shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])


def device_name() -> str:
    """Such as "NVIDIA H100 80GB HBM3 x 8" or "AMD EPYC 9B45, 2 cores"."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return f"{_processor()}, {os.cpu_count()} cores"
    count = f" x {len(devices)}" if len(devices) > 1 else ""
    return devices[0].device_kind + count


def versions() -> dict[str, str]:
    """Of everything that can change a number in a report, as far as it is installed."""
    installed = {}
    for name in ("jax", "jaxlib", "flax", "av"):
        # PyAV may be missing where no file is read or written.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
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
