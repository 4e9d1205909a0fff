"""Programs compiled for GPUs that are not there: the compiler takes them, and says what they need.

Needs the [aot] extra. The GPUs are described in tests/gpu_specs, one file each.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from longlive_jax import rollout, sampler
from longlive_jax.config import WAN21_T2V_1_3B, WAN22_TI2V_5B, Recache
from longlive_jax.dit.model import DiT, TextKV

pytestmark = pytest.mark.aot

MEMORY = {"h100": 84.9e9, "b200": 191e9}  # bytes; what the descriptions say
ASKS = re.compile(r"\b(infeed|outfeed|send|recv)(-done)?\(|callback")  # in a program's text
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
    assert not ASKS.search(compiled.as_text())
    # The cache is donated: the keys and values of the window exist once.
    window = 2 * cfg.dit.layers * cfg.dit.dim * cfg.stream.window * cfg.tokens_per_frame * 2
    assert memory.alias_size_in_bytes >= window


@pytest.mark.parametrize("sinks", Recache.SINKS)
def test_a_window_is_recached_within_memory(device, sinks):
    cfg = WAN21_T2V_1_3B
    sharding = device("h100")
    dit, memory, text, _ = begun(cfg, sharding)
    rows = jax.ShapeDtypeStruct((1,), jnp.bool_, sharding=sharding)
    how = dict(stream=cfg.stream, how=Recache(sinks=sinks))
    compiled = rollout.recache.lower(dit, memory, text, rows, **how).compile()
    assert compiled.memory_analysis().peak_memory_in_bytes < MEMORY["h100"]
