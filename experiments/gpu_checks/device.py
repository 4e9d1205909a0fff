"""Facts of the device and of installed packages; the speed of a large matmul and a large copy.

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
    """FLOP/s of a large matmul and bytes/s of a large copy, to compare kernels with."""
    effort = bench_kernels.GPU
    if jax.default_backend() == "cpu":  # a stand-in: small sizes will do
        effort = dataclasses.replace(bench_kernels.CPU, side=512, copied=1 << 24)
    return dataclasses.asdict(bench_kernels.measured_peaks(effort))


def _packages() -> dict[str, str]:
    """Versions of packages that can change a result, CUDA libraries included."""
    found = {x.metadata["Name"] or "": x.version for x in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(found) if name.lower().startswith(PACKAGES)}


def _cudnn() -> int | None:
    """The version of the loaded cuDNN as one number, such as 91300."""
    if jax.default_backend() != "gpu":
        return None
    try:
        library = ctypes.CDLL("libcudnn.so.9")
        library.cudnnGetVersion.restype = ctypes.c_size_t
        return int(library.cudnnGetVersion())
    except (OSError, AttributeError):
        return None


def _nvidia_smi() -> list[dict[str, str]]:
    """The driver's facts of every GPU; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    command = [tool or "", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    lines = (_output(command) or "").splitlines() if tool else []
    return [dict(zip(QUERY, line.split(", "), strict=False)) for line in lines]


def _git(*arguments: str) -> str | None:
    """Output of a git command in the checkout; None without git or its history."""
    tool = shutil.which("git")
    text = _output([tool, "-C", str(ROOT), *arguments]) if tool else None
    return None if text is None else text.strip()


def _changed() -> int | None:
    """The number of tracked files that differ from the commit."""
    text = _git("status", "--porcelain", "--untracked-files=no")
    return None if text is None else len(text.splitlines())


def _output(command: list[str]) -> str | None:
    """Standard output of a command; None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _digest() -> str:
    """A digest of the sources of our kernels."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


if __name__ == "__main__":
    child.each(pathlib.Path(sys.argv[1]), sys.argv[2:], measure)
