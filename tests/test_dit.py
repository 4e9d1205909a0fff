"""The transformer against the references: RoPE, embeddings, masks, and every kind of forward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wan
from longlive_kernels.attention.chunk_table import chunk_table

from longlive_jax import sharding
from longlive_jax.config import DiTConfig
from longlive_jax.dit import attention, mask
from longlive_jax.dit.attention import masked
from longlive_jax.dit.model import TextKV, layer_norm, modulate
from longlive_jax.dit.rope import frequencies, phases, rotate
from longlive_jax.dit.timestep import sinusoid

ROPE = DiTConfig(dim=64, ffn_dim=1, heads=2, layers=1, channels=1, text_dim=1, text_len=1)


def frames(count, *, start=0, offset=0.0, scale=1.0, batch=1):
    position = np.float32(np.arange(count) + start + offset) * np.float32(scale)
    return jnp.broadcast_to(jnp.asarray(position), (batch, count))


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("rope_apply", dict()),
        ("rope_apply_tscale0.5", dict(scale=0.5)),
        ("rope_apply_off8", dict(offset=8.0)),
        ("rope_apply_off8_tscale0.5", dict(offset=8.0, scale=0.5)),
        ("rope_apply_off_F", dict(offset="off_F")),
        ("rope_apply_off_BF", dict(offset="off_BF")),
        ("causal_start5", dict(start=5)),
        ("causal_start5_off8", dict(start=5, offset=8.0)),
    ],
)
def test_01_rope(golden, name, positions):
    case = golden("longlive2", "01_rope")
    x = jnp.asarray(case["in/x"])
    if isinstance(positions.get("offset"), str):
        positions = positions | {"offset": case["in/" + positions["offset"]]}
    angles = phases(ROPE, frames(4, batch=2, **positions), 2, 2)
    padded = jnp.pad(angles, ((0, 0), (0, x.shape[1] - angles.shape[1]), (0, 0)))
    np.testing.assert_allclose(rotate(x, padded), case["out/" + name], atol=2e-5)


def test_01_rope_table(golden):
    case = golden("longlive2", "01_rope")
    angles = np.arange(64)[:, None] * np.concatenate(frequencies(ROPE))
    np.testing.assert_allclose(np.cos(angles), case["out/freqs_table_cos"], atol=1e-6)
    np.testing.assert_allclose(np.sin(angles), case["out/freqs_table_sin"], atol=1e-6)


def test_02_embed_head(golden):
    case, dit = golden("longlive2", "02_embed_head"), wan.longlive2("gen")
    t = jnp.asarray(case["in/t"])[None]
    close = lambda x, name: np.testing.assert_allclose(x, case[f"out/{name}"], atol=1e-4)  # noqa: E731
    np.testing.assert_allclose(sinusoid(t[0], 256), case["out/sinusoid"], rtol=0, atol=2**-24)
    time = dit.time_embedding(t)[0]
    close(time, "time_embedding")
    close(dit.time_projection(jax.nn.silu(time)).reshape(8, 6, 64), "time_projection")
    video = wan.channel_last(case["in/video"])
    close(dit.patch_embedding(dit.patchify(video)), "patch_embedding_tokens")
    text = jax.nn.gelu(dit.text_in(jnp.asarray(case["in/text"])), approximate=True)
    close(dit.text_out(text), "text_embedding")
    tokens, e = jnp.asarray(case["in/head_tokens"]), jnp.asarray(case["in/head_e_causal"])
    shift, scale = jnp.moveaxis(e + dit.head_modulation[...], 2, 0)
    out = dit.head(modulate(layer_norm(tokens, 1e-6), shift, scale))
    close(out.reshape(2, 4, 4, 16), "causal_head")
    close(wan.channel_first(dit.unpatchify(out, (4, 2, 2))), "unpatchify")


def run(dit, x, t, text, table, *, positions=None):
    """Velocity of latents b f h w c under a table over frames."""
    f, h, w = x.shape[1:4]
    positions = frames(f) if positions is None else positions
    attn = masked(
        table, phases(dit.cfg, jnp.broadcast_to(positions, (x.shape[0], f)), h // 2, w // 2)
    )
    return jax.jit(lambda dit, x, t, text: dit(x, t, text, attn)[0])(dit, x, jnp.asarray(t), text)


@pytest.mark.parametrize(
    "name", ["03_bidir_a_uniform_t", "03_bidir_b_per_token_t_padded", "03_bidir_c_multi_prompt"]
)
def test_bidirectional(golden, name):
    case, dit = golden("longlive2", name), wan.longlive2("real")
    x = wan.channel_last(case["in/x"])
    tokens = x.shape[1] * x.shape[2] * x.shape[3] // 4
    t = case["in/t"][:, :tokens] if case["in/t"].ndim == 2 else case["in/t"][:, None]
    text = dit.text_kv(
        jnp.asarray(case["in/context"].reshape(2, 1, -1, 24))
    )  # all prompts to all tokens
    out = run(dit, x, t, text, mask.table(mask.clean(4, 4)))
    np.testing.assert_allclose(wan.channel_first(out), case["out/velocity"], atol=1e-4)


CAUSAL = {
    "04_a_blockwise": dict(),
    "04_a2_blockwise_multiprompt": dict(),
    "04_c_independent_first_frame": dict(first=1),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal(golden, name):
    case, dit = golden("longlive2", name), wan.longlive2("gen")
    x = wan.channel_last(case["in/x"])
    table = mask.table(mask.clean(x.shape[1], 2, **CAUSAL[name]))
    out = run(dit, x, case["in/t"], wan.prompts(dit, case["in/context"], 2), table)
    np.testing.assert_allclose(wan.channel_first(out), case["out/velocity"], atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "04_b1_tf_one_prompt",
        "04_b2_tf_multiprompt",
        "04_b3_tf_multiprompt_aug",
        "04_d_tf_ropeoffset_tscale",
    ],
)
def test_teacher_forcing(golden, name):
    case, dit = golden("longlive2", name), wan.longlive2("gen")
    x = wan.channel_last(np.concatenate([case["in/clean_x"], case["in/x"]], 2))
    t = np.concatenate([case.get("in/aug_t", np.zeros_like(case["in/t"])), case["in/t"]], 1)
    text = wan.prompts(dit, case["in/context"], 2)
    text = TextKV(
        *(jnp.concatenate([y, y], 2) for y in (text.k, text.v))
    )  # each half has all prompts
    scale = 0.5 if "tscale" in name else 1.0
    position = frames(6, offset=case.get("in/rope_temporal_offset", 0.0), scale=scale, batch=2)
    table = mask.table(mask.teacher_forcing(mask.clean(6, 2)))
    out = run(dit, x, t, text, table, positions=jnp.concatenate([position, position], 1))
    np.testing.assert_allclose(wan.channel_first(out[:, 6:]), case["out/velocity"], atol=1e-4)


def _mask_cases():
    grid = {
        "blockwise": [(8, 3, 2), (9, 2, 3), (9, 3, 2)],
        "tf": [(8, 3, 2), (9, 2, 3)],
        "i2v": [(9, 3, 2), (10, 2, 3)],
    }
    for kind, sizes in grid.items():
        for f, tokens, n in sizes:
            yield f"{kind}_F{f}_fs{tokens}_n{n}", kind, f, tokens, n, 1
    for f, tokens, n in [(8, 2, 2), (12, 1, 3), (12, 2, 2)]:
        for ranks in (1, 2, 4):
            yield f"natural_F{f}_fs{tokens}_n{n}_sp{ranks}", "natural", f, tokens, n, ranks


@pytest.mark.parametrize(("name", "kind", "f", "tokens", "n", "ranks"), list(_mask_cases()))
def test_04_masks(golden, name, kind, f, tokens, n, ranks):
    labels = {
        "blockwise": lambda: mask.clean(f, n),
        "i2v": lambda: mask.clean(f, n, first=1),
        "tf": lambda: mask.teacher_forcing(mask.clean(f, n)),
        "natural": lambda: mask.interleaved(mask.clean(f, n), ranks),
    }[kind]()
    ours = np.kron(mask.table(labels), np.ones((tokens, tokens), bool))
    np.testing.assert_array_equal(
        ours, golden("longlive2", "04_masks")[f"out/mask/{name}"].astype(bool)
    )


@pytest.mark.parametrize("ranks", [1, 4])
def test_prompts_are_attended_by_the_kernel_that_is_named(monkeypatch, ranks):
    """Each segment of a video its own prompt, on whichever device the video is."""
    asked = []

    def attending(q, k, v, table, implementation):
        asked.append((table, implementation))
        return chunk_table(q, k, v, table)

    monkeypatch.setattr(attention, "chunk_table", attending)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (4, 2, n, 3, 8)) for key, n in zip(keys, (12, 5, 5), strict=True)
    )
    none = jnp.zeros((4, 1), jnp.int32)
    mesh = sharding.make_mesh(ranks, devices=jax.devices()[:ranks]) if ranks > 1 else None
    visible = jnp.ones((4, 1, 1), bool)
    attn = attention.Cached(jnp.zeros((4, 1, 4)), none, none, visible, backend="mosaic", mesh=mesh)
    found = jax.jit(lambda attn, *given: attn.text(*given))(attn, q, k, v)
    assert asked == [(attention.EVERYTHING, "mosaic")] * 2
    np.testing.assert_allclose(found, attention.OfPrompts().text(q, k, v), atol=1e-5)
    # What has no kernel for prompts leaves them to the default, as "best" does.
    for backend in ("best", "tokamax"):
        other = dataclasses.replace(attn, backend=backend)
        np.testing.assert_array_equal(other.text(q, k, v), attention.OfPrompts().text(q, k, v))
    assert asked[2:] == [(attention.EVERYTHING, None)] * 4
