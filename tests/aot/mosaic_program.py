"""Compiles one NVFP4 product in Mosaic for a described GPU: `mosaic_program.py GPU BACKEND SHAPE`.

A program of its own, because Mosaic keeps the architecture it has first compiled for as long as its
process runs (jax 0.10.2).
"""

import functools
import importlib
import sys

import described
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from longlive_kernels import absent_gpu
from longlive_kernels.nvfp4 import NVFP4
from longlive_kernels.nvfp4.format import BLOCK
from longlive_kernels.nvfp4.matmul.shapes import SHAPES


def nvfp4(shape, sharding) -> NVFP4:
    *stack, rows, columns = shape
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    return NVFP4(
        array((*stack, rows, columns // 2), jnp.uint8),
        array((*stack, rows, columns // BLOCK), jnp.float8_e4m3fn),
        array(tuple(stack), jnp.float32),
        "mse",
    )


def main(gpu: str, backend: str, name: str) -> int:
    """Bytes of temporary arrays."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    (device,) = described.devices(gpu)
    sharding = SingleDeviceSharding(device)
    module = importlib.import_module(f"longlive_kernels.nvfp4.matmul.{backend}")
    shape = SHAPES[name]
    if backend == "wgmma":
        function = module.matmul_w4a16
        a = jax.ShapeDtypeStruct(shape.a, jnp.bfloat16, sharding=sharding)
    else:
        function, a = module.matmul, nvfp4(shape.a, sharding)
    call = jax.jit(functools.partial(function, dtype=jnp.bfloat16))
    with absent_gpu.target(device):
        program = call.lower(a, nvfp4(shape.b, sharding)).compile()
    return program.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    sys.stdout.write(f"\ntemporary {main(*sys.argv[1:])}\n")
