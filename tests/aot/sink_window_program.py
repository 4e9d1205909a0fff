"""Compiles attention over slots in Mosaic for a described GPU: `sink_window_program.py GPU BACKEND
SHAPE KIND [SM]`. KIND: of slots; int8_scores and fp8_scores are multiplied so, too; gradient: that
of queries, slots in bfloat16. SM: the architecture that our kernel is written for, of another GPU.

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
from longlive_kernels.attention.sink_window import Fresh, Scaled
from longlive_kernels.attention.sink_window.call import Call
from longlive_kernels.attention.sink_window.shapes import SHAPES
from longlive_kernels.nvfp4 import NVFP4

EIGHT = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def main(gpu: str, backend: str, name: str, kind: str, sm: str = "") -> int:
    """Bytes of temporary arrays."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    (device,) = described.devices(gpu)
    sharding = SingleDeviceSharding(device)
    run = importlib.import_module(f"longlive_kernels.attention.sink_window.{backend}").attend
    if sm:
        run = functools.partial(run, sm=int(sm))
    shape = SHAPES[name]
    *lead, tokens, heads, width = shape.keys
    kind, _, scores = kind.partition("_")

    def array(sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(tuple(sizes), dtype, sharding=sharding)

    def table():
        if kind in EIGHT:
            return array(shape.keys, EIGHT[kind]), array(shape.keys[:-1], jnp.float32)
        if kind == "nvfp4":
            rows = (*lead, tokens * heads)
            packed = array((*rows, width // 2), jnp.uint8)
            return packed, array((*rows, width // 16), jnp.float8_e4m3fn), array(lead, jnp.float32)
        return (array(shape.keys),)

    def attend(q, k, v, visible, layer, fresh, read):
        make = {1: lambda x: x, 2: Scaled, 3: lambda *x: NVFP4(*x, "mse")}[len(k)]
        keys = Scaled(*k, multiplied=True) if scores else make(*k)
        fresh = Fresh(*fresh) if kind in (*EIGHT, "nvfp4") else None
        turns = read if shape.relative else None
        return run(Call(q, keys, make(*v), visible, layer, turns, fresh, shape.order))

    def gradient(q, *rest):
        return jax.vjp(lambda q: attend(q, *rest), q)[1](q)

    rows, _, slots = shape.table.shape
    new = array((rows, len(shape.own), tokens, heads, width))
    given = (
        array(shape.queries),
        table(),
        table(),
        array(shape.asked.shape, bool),
        array((), jnp.int32),
        (new, new, array((rows, len(shape.own)), jnp.int32)),
        array((rows, slots, shape.turned), jnp.float32),
    )
    wanted = gradient if kind == "gradient" else attend
    with absent_gpu.target(device):
        program = jax.jit(wanted, keep_unused=True).lower(*given).compile()
    return program.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    sys.stdout.write(f"\ntemporary {main(*sys.argv[1:])}\n")
