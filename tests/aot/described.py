"""The GPUs of tests/gpu_specs, as the compiler sees them."""

import pathlib
from collections.abc import Sequence

import jax
from longlive_kernels import absent_gpu

SPECS = pathlib.Path(__file__).parents[1] / "gpu_specs"


def devices(gpu: str, count: int = 1) -> Sequence[jax.Device]:
    return absent_gpu.devices(gpu, (SPECS / f"{gpu}.txtpb").read_text(), count)
