"""Facts of the device and of what is installed; the best of a product and of a copy.

python -m gpu_checks.device RESULTS ENTRY…, an entry being "facts" or "peaks".
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import importlib.metadata
import pathlib
import platform
import shutil
import subprocess
import sys
from typing import Any

import jax

from gpu_checks import child
from longlive_jax import bench_kernels, report

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("jax", "flax", "numpy", "ml-dtypes", "tokamax", "triton", "av", "nvidia-", "optax")
QUERY = ("name", "driver_version", "memory.total", "compute_cap", "power.limit")


def measure(entry: str) -> dict[str, Any]:
    return {"facts": facts, "peaks": peaks}[entry]()


def facts() -> dict[str, Any]:
    first = jax.devices()[0]
    stats = first.memory_stats() or {}
    return {
        "platform": first.platform,
        "name": report.device_name(),
        "kind": first.device_kind,
        "count": jax.device_count(),
        "compute_capability": getattr(first, "compute_capability", None),
        "memory_limit_bytes": stats.get("bytes_limit"),
        "runtime": first.client.platform_version,
        "cudnn": _cudnn(),
        "nvidia_smi": _nvidia_smi(),
        "python": platform.python_version(),
        "packages": _packages(),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _changed(),
        "kernels_sha256": _digest(),
    }


def peaks() -> dict[str, Any]:
    """What kernels are held against: a large product and a large copy."""
    effort = bench_kernels.GPU
    if jax.default_backend() == "cpu":  # which only stands in
        effort = dataclasses.replace(bench_kernels.CPU, side=512, copied=1 << 24)
    return dataclasses.asdict(bench_kernels.measured_peaks(effort))


def _packages() -> dict[str, str]:
    """Versions of what can change a number, by name, CUDA's libraries among them."""
    found = {x.metadata["Name"] or "": x.version for x in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(found) if name.lower().startswith(PACKAGES)}


def _cudnn() -> int | None:
    """The number of the cuDNN that is loaded, such as 91300."""
    if jax.default_backend() != "gpu":
        return None
    try:
        library = ctypes.CDLL("libcudnn.so.9")
        library.cudnnGetVersion.restype = ctypes.c_size_t
        return int(library.cudnnGetVersion())
    except (OSError, AttributeError):
        return None


def _nvidia_smi() -> list[dict[str, str]]:
    """What the driver says of every GPU; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    command = [tool or "", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    lines = (_said(command) or "").splitlines() if tool else []
    return [dict(zip(QUERY, line.split(", "), strict=False)) for line in lines]


def _git(*arguments: str) -> str | None:
    """What git says of the checkout; None where there is no git, or no history."""
    tool = shutil.which("git")
    said = _said([tool, "-C", str(ROOT), *arguments]) if tool else None
    return None if said is None else said.strip()


def _changed() -> int | None:
    """How many files differ from the commit."""
    said = _git("status", "--porcelain", "--untracked-files=no")
    return None if said is None else len(said.splitlines())


def _said(command: list[str]) -> str | None:
    """Its output; None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _digest() -> str:
    """Of the sources of our kernels."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


if __name__ == "__main__":
    child.each(pathlib.Path(sys.argv[1]), sys.argv[2:], measure)
