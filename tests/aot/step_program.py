"""Compiles all steps of a chunk, attention in Mosaic, for a described GPU: `step_program.py GPU
PRESET KV`. KV: how slots are kept; fp8_scores are multiplied so, too.

A program of its own, because Mosaic keeps the architecture it has first compiled for as long as its
process runs (jax 0.10.2).
"""

import dataclasses
import sys

import described
import jax
from jax.sharding import SingleDeviceSharding
from longlive_kernels import absent_gpu

from longlive_jax import footprint
from longlive_jax.config import WAN21_T2V_1_3B, WAN22_TI2V_5B, ModelConfig

PRESETS = {cfg.name: cfg for cfg in (WAN21_T2V_1_3B, WAN22_TI2V_5B)}


def streaming(preset: str, kv: str) -> ModelConfig:
    """The preset as it is served, by our own kernel."""
    kept, _, scores = kv.partition("_")
    cfg = PRESETS[preset]
    how = dict(attention="mosaic", kv=kept, eight_bit_scores=bool(scores))
    return dataclasses.replace(cfg, stream=dataclasses.replace(cfg.stream, **how))


def main(gpu: str, preset: str, kv: str) -> jax.stages.Compiled:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    (device,) = described.devices(gpu)
    cfg = streaming(preset, kv)
    run, given = footprint.programs(cfg, SingleDeviceSharding(device))["denoise"]
    with absent_gpu.target(device):
        return run.lower(*given).compile()


if __name__ == "__main__":
    program = main(*sys.argv[1:])
    memory = program.memory_analysis()
    sizes = memory.peak_memory_in_bytes, memory.alias_size_in_bytes, memory.temp_size_in_bytes
    sys.stdout.write(program.as_text() + "\nmemory {} {} {}\n".format(*sizes))
