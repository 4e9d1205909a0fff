"""Programs compiled for GPUs that are not there: the compiler takes them, and says what they need.

Needs the [aot] extra. The GPUs are described in tests/gpu_specs, one file each.
"""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from longlive_jax import rollout, sampler
from longlive_jax.config import WAN21_T2V_1_3B, WAN22_TI2V_5B, Recache
from longlive_jax.dit.model import DiT, TextKV

pytestmark = pytest.mark.aot

MEMORY = {"h100": 84.9e9, "b200": 191e9}  # bytes; what the descriptions say
# What a program on a GPU asks the host for, in its text: data, or which way it is to go on. Of a
# loop that says how often it runs, the host knows it beforehand.
ASKS = re.compile(r"\b(infeed|outfeed|send|recv)(-done)?\(|callback|\bconditional\(")
LOOPS = re.compile(r"^.* while\(.*$", re.MULTILINE)
PROGRAM = pathlib.Path(__file__).with_name("step_program.py")
PRESETS = {cfg.name: cfg for cfg in (WAN21_T2V_1_3B, WAN22_TI2V_5B)}


def described(tree, sharding):
    """The arrays of `tree` by shape and type, in bfloat16 where they are real, on that device."""

    def leaf(x):
        dtype = jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding)

    return jax.tree.map(leaf, tree)


def begun(cfg, sharding):
    """Abstract weights, a rollout, one prompt and the noise of one chunk."""
    dit = nnx.eval_shape(lambda: DiT(cfg.dit, rngs=nnx.Rngs(0)))
    memory = jax.eval_shape(lambda: rollout.begin(cfg, [0], jnp.bfloat16))
    shape = (cfg.dit.layers, 1, 1, cfg.dit.text_len, cfg.dit.heads, cfg.dit.head_dim)
    text = TextKV(*2 * [jax.ShapeDtypeStruct(shape, jnp.bfloat16)])
    noise = jax.eval_shape(lambda memory: rollout.noise(memory, cfg.stream.chunk), memory)
    return described((dit, memory, text, noise), sharding)


def goes_alone(text: str) -> bool:
    """Whether a program runs from end to end without the host."""
    loops = LOOPS.findall(text)
    assert loops  # of steps and layers
    return not ASKS.search(text) and all("known_trip_count" in loop for loop in loops)


def window_bytes(cfg) -> int:
    """Of its keys and values in bfloat16."""
    return 2 * cfg.dit.layers * cfg.dit.dim * cfg.stream.window * cfg.tokens_per_frame * 2


@pytest.mark.parametrize("gpu", ["h100", "b200", "rtx6000pro"])
def test_a_matrix_product_compiles(device, gpu):
    sharding = device(gpu)
    a = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=sharding)
    compiled = jax.jit(lambda x, y: jax.nn.relu(x @ y)).lower(a, a).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * 512 * 512 * 2


@pytest.mark.parametrize("gpu", ["h100", "b200"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_chunk_is_denoised_within_memory_and_in_place(device, gpu, name):
    cfg = PRESETS[name]
    dit, memory, text, noise = begun(cfg, device(gpu))
    lowered = rollout.generate.lower(
        dit, memory, text, noise, stream=cfg.stream, solver=sampler.make(cfg.sampler)
    )
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    assert memory.peak_memory_in_bytes < MEMORY[gpu]
    # All steps and the clean pass are one program, which asks the host for nothing on the way.
    assert goes_alone(compiled.as_text())
    # The cache is donated: the keys and values of the window exist once.
    assert memory.alias_size_in_bytes >= window_bytes(cfg)


@pytest.mark.parametrize(
    "gpu, name, kv",
    [
        ("h100", "wan21_t2v_1_3b", "model"),
        ("h100", "wan22_ti2v_5b", "model"),
        ("h100", "wan22_ti2v_5b", "fp8_scores"),
        ("b200", "wan22_ti2v_5b", "nvfp4"),
    ],
)
def test_a_chunk_by_our_kernel_is_one_program_in_place(gpu, name, kv):
    """The kernel reads the slots where they lie: beside arguments and results there is less than
    half of the window.
    """
    pytest.importorskip(
        "jax_plugins.xla_cuda13", reason="needs the [aot] extra", exc_type=ImportError
    )
    made = subprocess.run(
        [sys.executable, PROGRAM, gpu, name, kv], capture_output=True, text=True, check=True
    )
    *text, said = made.stdout.splitlines()
    text, (peak, alias, temporary) = "\n".join(text), map(int, said.split()[1:])
    # Frames and the prompt, in the steps and in the clean pass.
    assert len(re.findall(r'custom_call_target="mosaic_gpu', text)) == 4
    assert goes_alone(text)
    assert peak < MEMORY[gpu]
    bits = {"model": 16, "fp8_scores": 8, "nvfp4": 4}[kv]
    window = window_bytes(PRESETS[name]) * bits // 16
    assert alias >= window and temporary < window / 2


@pytest.mark.parametrize("sinks", Recache.SINKS)
def test_a_window_is_recached_within_memory(device, sinks):
    cfg = WAN21_T2V_1_3B
    sharding = device("h100")
    dit, memory, text, _ = begun(cfg, sharding)
    rows = jax.ShapeDtypeStruct((1,), jnp.bool_, sharding=sharding)
    how = dict(stream=cfg.stream, how=Recache(sinks=sinks))
    compiled = rollout.recache.lower(dit, memory, text, rows, **how).compile()
    assert compiled.memory_analysis().peak_memory_in_bytes < MEMORY["h100"]
