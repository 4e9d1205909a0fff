"""Both steps of distillation, compiled for eight GPUs."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from longlive_jax import footprint, gpus
from longlive_jax.config import WAN22_TI2V_5B
from longlive_jax.train import collectives

pytestmark = pytest.mark.aot
PATH = pathlib.Path(__file__).parents[2] / "experiments" / "dmd_memory.py"


MOST = {"student": 8e9, "critic": 12e9}  # bytes of a GPU, with two layers of thirty


def test_a_step_of_the_5b_holds_no_memory_for_every_layer():
    """Two layers of thirty. A memory that is kept for each, as a gradient through it would, is
    0.7 GB for two; scores that are kept are 50 GB.
    """
    if not footprint.toolchain():
        pytest.skip("needs the [aot] extra")
    spec = importlib.util.spec_from_file_location("dmd_memory", PATH)
    dmd_memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dmd_memory)
    dit = dataclasses.replace(WAN22_TI2V_5B.dit, layers=2)
    cfg = dataclasses.replace(WAN22_TI2V_5B, dit=dit)
    row = dmd_memory.Row(128, student="nvfp4", teacher="nvfp4")
    with jax.numpy_dtype_promotion("standard"):  # as for users
        found = dmd_memory.programs(row, cfg, gpus.find("h100"), 8)
    matrix = 2 * dit.dim * dit.ffn_dim
    for which, most in MOST.items():
        assert dmd_memory.peak(found[which]) < most, which
        # A layer's weights go to where tokens are; a clip's tokens would be forty times as much.
        assert 0 < collectives.largest(found[which].as_text()) <= matrix, which


def test_our_kernels_attend_in_a_distillation(tmp_path):
    """A process of its own, as Mosaic keeps the architecture that it has first compiled for."""
    if not footprint.toolchain():
        pytest.skip("needs the [aot] extra")
    made = tmp_path / "memory.json"
    how = "--layers=2", "--rows=2", "--attention=mosaic", f"--json={made}"
    done = subprocess.run(
        [sys.executable, PATH, *how],
        env=os.environ | {"MOSAIC_GPU_DUMP_PTX": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    kernels = set(re.findall(r"\.entry (\w+)_mosaic_gpu_kernel", done.stdout))
    # Of the memory; of clips that are judged and of prompts, forwards and their two gradients.
    of_tables = {f"chunk_table_{name}" for name in ("forward", "queries", "keys")}
    assert kernels == {"sink_window_bfloat16"} | of_tables
    (found,) = json.loads(made.read_text()).values()
    for which, most in MOST.items():
        assert found[which] < most, which
