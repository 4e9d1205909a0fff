"""Compiles training attention and its gradient in Mosaic for a described GPU:
`chunk_table_program.py GPU CALL`.

A program of its own, because Mosaic keeps the architecture it has first compiled for as long as its
process runs (jax 0.10.2).
"""

import functools
import sys

import described
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from longlive_kernels import absent_gpu, arch
from longlive_kernels.attention.chunk_table import Table, mosaic, shapes


def balanced(frames: int, ranks: int) -> shapes.Shape:
    """What one rank computes after the exchange of heads for tokens."""
    table = shapes.teacher_forcing(shapes.chunks(frames, 8), ranks=ranks)
    heads = shapes.WAN_5B["heads"] // ranks
    return shapes.Shape(Table.of(table), **shapes.WAN_5B | dict(heads=heads))


CALLS = {f"5b_{frames}_frames_4_ranks": balanced(frames, 4) for frames in (96, 192, 384)} | {
    name: shapes.SHAPES[name] for name in ("1.3b_16s", "1.3b_window")
}


def gradients(attention, q, k, v, grad):
    out, pull = jax.vjp(attention, q, k, v)
    return out, pull(grad)


def main(gpu: str, name: str, ranks: str = "1") -> int:
    """Bytes of temporary arrays of a GPU. ranks: GPUs that `jax.shard_map` cuts heads over; each
    has those of the call.
    """
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    shape, count = CALLS[name], int(ranks)
    devices = described.devices(gpu, count)
    attention = functools.partial(mosaic.attend, table=shape.table, sm=arch.of(devices[0]))
    if count == 1:
        sharding = SingleDeviceSharding(devices[0])
    else:
        mesh = jax.sharding.Mesh(devices, ("ranks",), axis_types=(AxisType.Auto,))
        heads = PartitionSpec(None, None, "ranks")
        sharding = NamedSharding(mesh, heads)
        attention = jax.shard_map(attention, mesh=mesh, in_specs=heads, out_specs=heads)
    q, k = (
        jax.ShapeDtypeStruct((b, n, count * a, d), jnp.bfloat16, sharding=sharding)
        for b, n, a, d in (shape.queries, shape.keys)
    )
    run = jax.jit(functools.partial(gradients, attention))
    with absent_gpu.target(devices[0]):
        program = run.lower(q, k, k, q).compile()
    return program.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    sys.stdout.write(f"\ntemporary {main(*sys.argv[1:])}\n")
