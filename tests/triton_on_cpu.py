"""Triton kernels in Triton's interpreter, in a process that knows of it from its start.

Two of its conversions are replaced. Its rounding to e4m3 takes ties upwards and loses carries; and
it takes every scale of a block-scaled product for a power of two (Triton 3.9).
"""

import os
import pickle
import sys

os.environ["TRITON_INTERPRET"] = "1"

import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from longlive_kernels.nvfp4.matmul.dot_scaled import product  # noqa: E402
from longlive_kernels.nvfp4.quantize.fused import quantized  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

E4M3 = ml_dtypes.float8_e4m3fn
KERNELS = {"product": product, "quantized": quantized}
_convert = interpreter._convert_float


def convert(data, source, target, mode):
    if (source, target) == (tl.float32, tl.float8e4nv):
        return data.astype(E4M3).view(np.uint8)
    return _convert(data, source, target, mode)


interpreter._convert_float = convert
interpreter._dot_scaled_scale_to_f32 = lambda scale, _: scale.data.view(E4M3).astype(np.float32)


def tensor(x: np.ndarray) -> torch.Tensor:
    for numpy, integer, kind in (
        (ml_dtypes.bfloat16, np.int16, torch.bfloat16),
        (E4M3, np.uint8, torch.float8_e4m3fn),
    ):
        if x.dtype == numpy:
            return torch.from_numpy(x.view(integer)).view(kind)
    return torch.from_numpy(x)


def run(kernel: str, grid: tuple, arrays: list, outputs: list, constants: dict) -> list:
    """A call: what it reads, shapes and types of what it writes. Returns that, as bytes."""
    written = [tensor(np.zeros(shape, dtype)) for shape, dtype in outputs]
    KERNELS[kernel][grid](*map(tensor, arrays), *written, **constants)
    return [x.view(torch.uint8).numpy() for x in written]


if __name__ == "__main__":
    pickle.dump([run(*call) for call in pickle.load(sys.stdin.buffer)], sys.stdout.buffer)
