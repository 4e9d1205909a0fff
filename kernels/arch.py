"""Which GPU a kernel is for, and what it lacks. A number such as 90: Hopper; 100: Blackwell."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from unittest import mock

import jax
from jax.extend import backend

CUDNN = 91300  # 9.13: the version that is pretended to be installed
FP4 = 100  # the first with units that multiply four-bit floats


def of(device: jax.Device) -> int | None:
    """The architecture of an NVIDIA GPU, described ones included; None of anything else."""
    version = re.fullmatch(r"(\d+)\.(\d)", str(getattr(device, "compute_capability", "")))
    return int("".join(version.groups())) if version else None


def default() -> int | None:
    """That of the device where programs run unless told otherwise."""
    return of(backend.get_default_device())


@contextlib.contextmanager
def pretended(device: jax.Device) -> Iterator[None]:
    """What is traced and compiled meanwhile is written for `device`, which need not be there.

    Kernels ask what a device is, and JAX whether cuDNN is installed and takes a call, long before a
    compiler does: of the process's own devices, and no argument tells them otherwise (jax 0.10.2,
    tokamax 0.0.12). Holds for all threads; inner programs that were traced before stay as they are.
    """
    version = float(device.compute_capability)
    with (
        mock.patch.object(backend, "get_default_device", lambda: device),
        mock.patch.multiple(
            "jax._src.cudnn.fused_attention_stablehlo",
            check_cudnn_version=lambda: CUDNN,
            check_compute_capability=lambda least: version >= float(least),
        ),
    ):
        yield


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
