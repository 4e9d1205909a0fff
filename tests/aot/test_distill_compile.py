"""Both steps of distillation, compiled for eight GPUs."""

import dataclasses
import importlib.util
import pathlib

import jax
import pytest

from longlive_jax import footprint, gpus
from longlive_jax.config import WAN22_TI2V_5B

pytestmark = pytest.mark.aot
PATH = pathlib.Path(__file__).parents[2] / "experiments" / "dmd_memory.py"


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
        found = dmd_memory.peak(row, cfg, gpus.find("h100"), 8)
    assert found["student"] < 14e9 and found["critic"] < 18e9
