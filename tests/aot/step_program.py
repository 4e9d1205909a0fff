"""Compiles all steps of a chunk, attention in Mosaic, for a described GPU: `step_program.py GPU
PRESET KV`. KV: how slots are kept; fp8_scores are multiplied so, too.

A program of its own, because Mosaic keeps the architecture it has first compiled for as long as its
process runs (jax 0.10.2).
"""

import dataclasses
import pathlib
import sys

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from longlive_kernels import arch

from longlive_jax import footprint
from longlive_jax.config import WAN21_T2V_1_3B, WAN22_TI2V_5B, ModelConfig

SPECS = pathlib.Path(__file__).parents[1] / "gpu_specs"
PRESETS = {cfg.name: cfg for cfg in (WAN21_T2V_1_3B, WAN22_TI2V_5B)}


def streaming(preset: str, kv: str) -> ModelConfig:
    """The preset as it is served, by our own kernel."""
    kept, _, scores = kv.partition("_")
    cfg = PRESETS[preset]
    how = dict(attention="mosaic", kv=kept, eight_bit_scores=bool(scores))
    return dataclasses.replace(cfg, stream=dataclasses.replace(cfg.stream, **how))


def main(gpu: str, preset: str, kv: str) -> jax.stages.Compiled:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    spec = (SPECS / f"{gpu}.txtpb").read_text()
    described = dict(platform="cuda", topology_name=gpu, target_config=spec, topology="1x1x1")
    device = topologies.get_topology_desc(**described).devices[0]
    cfg = streaming(preset, kv)
    run, given = footprint.programs(cfg, SingleDeviceSharding(device))["denoise"]
    with arch.pretended(device):
        return run.lower(*given).compile()


if __name__ == "__main__":
    program = main(*sys.argv[1:])
    memory = program.memory_analysis()
    sizes = memory.peak_memory_in_bytes, memory.alias_size_in_bytes, memory.temp_size_in_bytes
    sys.stdout.write(program.as_text() + "\nmemory {} {} {}\n".format(*sizes))
