"""The UMT5 encoder against the reference, under both checkpoint namings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.config import TINY_TEXT, UMT5_XXL, TextConfig
from longlive_jax.convert import umt5 as names
from longlive_jax.convert.table import NameMismatch, export, fill
from longlive_jax.text.umt5 import UMT5, Block, buckets, encode

SMALL = TextConfig(vocab=97, dim=32, attn_dim=32, ffn_dim=48, heads=4, layers=2)
XXL_BLOCK = {
    "norm1.weight": (4096,),
    "attn.q.weight": (4096, 4096),
    "attn.k.weight": (4096, 4096),
    "attn.v.weight": (4096, 4096),
    "attn.o.weight": (4096, 4096),
    "norm2.weight": (4096,),
    "ffn.gate.0.weight": (10240, 4096),
    "ffn.fc1.weight": (10240, 4096),
    "ffn.fc2.weight": (4096, 10240),
    "pos_embedding.embedding.weight": (32, 64),
}
XXL = {"token_embedding.weight": (256384, 4096), "norm.weight": (4096,)} | {
    f"blocks.{i}.{name}": shape for i in range(24) for name, shape in XXL_BLOCK.items()
}


def abstract(cfg):
    return nnx.eval_shape(lambda: UMT5(cfg, rngs=nnx.Rngs(0)))


def wan_weights(case):
    return {k.removeprefix("w/"): v for k, v in case.items() if k.startswith("w/")}


@pytest.fixture
def case(golden):
    return golden("longlive1", "J_umt5")


@pytest.fixture
def tolerance(facts):
    return {k: v["atol"] for k, v in facts("longlive1", "J_umt5")["tolerance"].items()}


@pytest.fixture
def model(case):
    return fill(abstract(SMALL), names.rows(), wan_weights(case))


@pytest.fixture
def inputs(case):
    return jnp.asarray(case["in/ids"]), jnp.asarray(case["in/mask"])


def test_J_umt5_encoder(case, tolerance, model, inputs):
    ids, mask = inputs
    out = jax.jit(UMT5.__call__)(model, ids, mask.astype(bool))
    for name in ("out/embeddings", "out/transformers_last_hidden_state"):
        np.testing.assert_allclose(out, case[name], rtol=0, atol=tolerance[name])


@pytest.mark.parametrize("dtype", [bool, jnp.int32])
def test_J_umt5_padding_is_zeroed(case, tolerance, model, inputs, dtype):
    ids, mask = inputs
    out = jax.jit(encode)(model, ids, mask.astype(dtype))
    name = "out/wrapper_embeds"
    np.testing.assert_allclose(out, case[name], rtol=0, atol=tolerance[name])
    assert not np.asarray(out)[np.asarray(mask) == 0].any()


def test_J_umt5_transformers_names(case, facts, tolerance, inputs):
    renamed = facts("longlive1", "J_umt5")["transformers_name_map"]
    tensors = {renamed[name]: value for name, value in wan_weights(case).items()}
    model = fill(abstract(SMALL), names.rows_transformers(), tensors)
    ids, mask = inputs
    out = jax.jit(UMT5.__call__)(model, ids, mask.astype(bool))
    name = "out/transformers_last_hidden_state"
    np.testing.assert_allclose(out, case[name], rtol=0, atol=tolerance[name])
    back = export(model, names.rows_transformers())
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[k], v) for k, v in tensors.items())


def test_J_umt5_export_is_the_inverse(case, model):
    tensors = wan_weights(case)
    back = export(model, names.rows())
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[k], v) for k, v in tensors.items())


def test_J_umt5_a_missing_tensor_is_named(case):
    tensors = wan_weights(case)
    del tensors["blocks.1.pos_embedding.embedding.weight"]
    with pytest.raises(NameMismatch, match="missing: blocks.1.pos_embedding"):
        fill(abstract(SMALL), names.rows(), tensors)


def test_J_umt5_buckets(case):
    table = case["out/bucket_table"]  # of key - query = -511 ... 511
    position = np.arange(512)
    expected = table[position[None, :] - position[:, None] + 511]
    np.testing.assert_array_equal(buckets(512, 32, 128), expected)


def test_J_umt5_position_bias(case, tolerance, model):
    first = jax.tree.map(lambda x: x[0], model.blocks)
    bias = Block.bias(first, jnp.asarray(buckets(40, 32, 128)))
    name = "out/position_bias_layer0"
    np.testing.assert_allclose(bias[None], case[name], rtol=0, atol=tolerance[name])


def test_J_umt5_bfloat16_weights_stay_bfloat16(case, model, inputs):
    ids, mask = inputs
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    out = jax.jit(encode)(half, ids, mask)
    assert out.dtype == jnp.bfloat16
    error = np.asarray(out, np.float32) - case["out/wrapper_embeds"]
    assert np.abs(error).mean() < 0.05


def test_padding_ids_do_not_matter(model, inputs):
    ids, mask = inputs
    other = jnp.where(mask == 0, 5, ids)
    assert not np.array_equal(other, ids)
    run = functools.partial(jax.jit(encode), model)
    np.testing.assert_allclose(run(other, mask), run(ids, mask), rtol=0, atol=1e-6)


def test_xxl_shapes_equal_the_checkpoint():
    """Nothing is allocated: 5.7 billion parameters as shapes, then as zero-stride views."""
    leaves = nnx.to_flat_state(nnx.state(abstract(UMT5_XXL), nnx.Param))
    shapes = {".".join(map(str, path)): leaf.get_value().shape for path, leaf in leaves}
    found = {}
    for row in names.rows():
        value = np.broadcast_to(np.float32(0), shapes.pop(row.target))
        parts = value if "{i}" in row.source else [value]
        found |= {row.source.format(i=i): row.backward(x).shape for i, x in enumerate(parts)}
    assert not shapes
    assert found == XXL
    assert len(XXL) == 242
    assert sum(np.prod(shape, dtype=np.int64) for shape in XXL.values()) == 5_680_910_336


def test_tiny_starts_at_a_sensible_scale():
    model = jax.jit(lambda key: UMT5(TINY_TEXT, rngs=nnx.Rngs(key)))(jax.random.key(0))
    sizes = [x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert sum(sizes) <= 350_000
    ids = jax.random.randint(jax.random.key(0), (4, 16), 3, TINY_TEXT.vocab)
    mask = jnp.arange(16)[None] < jnp.array([16, 9, 4, 1])[:, None]
    out = np.asarray(jax.jit(encode)(model, ids, mask))
    assert 0.9 < out[np.asarray(mask)].std() < 1.1
    target = jax.random.normal(jax.random.key(1), out.shape)
    graph, state = nnx.split(model)

    def loss(state):
        return jnp.mean((encode(nnx.merge(graph, state), ids, mask) - target) ** 2)

    norms = jax.tree.map(jnp.linalg.norm, jax.jit(jax.grad(loss))(state))
    assert all(1e-6 < norm < 1 for norm in jax.tree.leaves(norms))
