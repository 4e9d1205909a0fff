"""What a user of a GPU gets without asking for anything: programs of the models' own configs."""

import hlo
import jax
import pytest
from longlive_kernels import absent_gpu

from longlive_jax import footprint
from longlive_jax.plan import PRESETS

pytestmark = pytest.mark.aot

CUDNN = 'custom_call_target="__cudnn$fmhaSoftmax"'
# GB that a chunk's program writes, beside what is updated in place; with attention="xla" these are
# 1231 and 5918.
MOST = {"wan21_1_3b": 110, "wan22_5b": 310}
# Beside the window's copy and the MLP: with jax 0.12 a layer's weights are copied meanwhile.
BESIDE = 1.1 if jax.__version_info__ < (0, 12) else 1.25


@pytest.fixture(scope="module")
def compiled():
    """`compiled(gpu, preset, program)`: the text of one of a model's programs, and its memory."""
    kept = {}

    def compile_(sharding, preset: str, name: str):
        (device,) = sharding.device_set
        key = device.device_kind, preset, name
        if key not in kept:
            program, given = footprint.programs(PRESETS[preset], sharding)[name]
            with absent_gpu.target(device):
                made = program.lower(*given).compile()
            kept[key] = made.as_text(), made.memory_analysis()
        return kept[key]

    return compile_


@pytest.mark.parametrize("gpu", ["h100", "b200"])
@pytest.mark.parametrize("preset", MOST)
def test_a_chunk_is_attended_by_cudnn_and_asks_no_host(device, compiled, gpu, preset):
    """The cache and the prompt, in the steps and in the clean pass. `hlo.runs` refuses loops whose
    trips the host must be asked for.
    """
    text, memory = compiled(device(gpu), preset, "denoise")
    assert text.count(CUDNN) == 4
    assert " conditional(" not in text
    assert hlo.written(text) < MOST[preset] * 1e9
    cfg = PRESETS[preset]
    window = 2 * 2 * cfg.stream.window * cfg.tokens_per_frame * cfg.dit.dim  # bf16, k and v
    mlp = 2 * cfg.stream.chunk * cfg.tokens_per_frame * (cfg.dit.ffn_dim + 2 * cfg.dit.dim)
    # Of the window there is the layer's own copy, and no second one in another order.
    assert memory.temp_size_in_bytes < BESIDE * (window + mlp)


@pytest.mark.parametrize("preset", MOST)
def test_a_recache_is_attended_by_cudnn_frame_by_frame(device, compiled, preset):
    """In a loop of known length, over one copy of the window."""
    cfg = PRESETS[preset]
    text, memory = compiled(device("h100"), preset, "switch")
    assert text.count(CUDNN) == 2
    assert " conditional(" not in text
    assert cfg.dit.layers * cfg.stream.window in hlo.runs(text).values()
    tokens = cfg.stream.window * cfg.tokens_per_frame
    window = 2 * 2 * tokens * cfg.dit.dim
    mlp = 2 * tokens * (cfg.dit.ffn_dim + 4 * cfg.dit.dim)
    assert memory.temp_size_in_bytes < 1.1 * (window + mlp)
