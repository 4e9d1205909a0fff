"""Which GPU a kernel is for, and what it lacks. A number such as 90: Hopper; 100: Blackwell."""

from __future__ import annotations

import re

import jax
from jax.extend import backend
from longlive_kernels.absent_gpu import Kind

FP4 = 100  # the first with units that multiply four-bit floats


def of(device: jax.Device | Kind) -> int | None:
    """The architecture of an NVIDIA GPU, described ones included; None of anything else."""
    version = re.fullmatch(r"(\d+)\.(\d)", str(getattr(device, "compute_capability", "")))
    return int("".join(version.groups())) if version else None


def default() -> int | None:
    """That of the device where programs run by default; see `absent_gpu.target` for another."""
    return of(backend.get_default_device())


def lacks_fp4(arch: int | None) -> str | None:
    """Why products of two four-bit matrices cannot run; None if they can."""
    if arch is None:
        return "needs an NVIDIA GPU"
    if arch < FP4:
        return (
            f"cannot run on sm_{arch}: Hopper and older GPUs have no FP4 units; "
            'use matmul_w4a16, or implementation="xla", which emulates it'
        )
    return None
