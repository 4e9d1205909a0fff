"""Faster decoders of the same latents, LightVAE and TAEHV: parity, streaming, names."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax import config, rollout
from longlive_jax.config import TINY, WAN21_TAE, WAN22_TAE, WAN22_VAE, TAEConfig, VAEConfig
from longlive_jax.convert import light, wan_vae
from longlive_jax.convert import tae as names
from longlive_jax.convert.table import NameMismatch, export, fill
from longlive_jax.errors import InputError
from longlive_jax.vae import tae, vae
from longlive_jax.vae.build import build

STRIDES = ((1, 2), (2, 2), (2, 2))
SMALL_LIGHT = VAEConfig(8, 5, 6, (1, 2, 4, 4), 1, STRIDES, patch=2, shortcut=True)
SMALL_TAE = TAEConfig(16, patch=2, encoder_dim=4, decoder_dims=(8, 6, 4, 4))
FULL = {"M_taew2_1_full": WAN21_TAE, "M_taew2_2_full": WAN22_TAE}
LATENT_SHAPE = {"light": (2, 2, 8), "tae": (2, 2, 16)}

stream = jax.jit(vae.stream, static_argnames="first")
decode, encode = jax.jit(vae.decode), jax.jit(vae.encode)
frames_and_video = jax.jit(lambda model, z: (tae.generate(model, z)[0], vae.decode(model, z)))


def channel_last(x):
    """b t c h w -> b t h w c, as TAEHV has it"""
    return np.moveaxis(x, 2, -1)


def video_like(x):
    """b c t h w -> b t h w c, as the VAEs have it"""
    return np.moveaxis(x, 1, -1)


@functools.cache
def abstract(cfg):
    return nnx.eval_shape(lambda: build(cfg, rngs=nnx.Rngs(0)))


def zeros(cfg):
    return jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), abstract(cfg))


def specs(cfg, rows):
    """Name in the file → shape and type; nothing is allocated."""
    flat = nnx.to_flat_state(nnx.state(abstract(cfg)))
    leaves = {".".join(map(str, path)): leaf.shape for path, leaf in flat}
    nothing = np.float32(0)
    return {row.source: row.backward(np.broadcast_to(nothing, leaves[row.target])) for row in rows}


def drawn(specs, seed):
    """The weights of the golden cases, in the order of their names."""
    rng = np.random.Generator(np.random.PCG64(seed))
    tensors = {}
    for name in sorted(specs):
        x = rng.standard_normal(specs[name].shape).astype(np.float32)
        fan_in = np.float32(np.sqrt(np.prod(x.shape[1:])))
        tensors[name] = np.float32(0.1) * x if x.ndim == 1 else x / fan_in
    return tensors


def tables():
    return {
        "light": (SMALL_LIGHT, wan_vae.rows_diffusers(SMALL_LIGHT)),
        "tae": (SMALL_TAE, names.rows(SMALL_TAE)),
    }


@functools.cache
def small(kind):
    cfg, rows = tables()[kind]
    return fill(abstract(cfg), rows, drawn(specs(cfg, rows), 0))


@functools.cache
def full(name, seed):
    cfg = FULL[name]
    return fill(abstract(cfg), names.rows(cfg), drawn(specs(cfg, names.rows(cfg)), seed))


def full_size(name, facts):
    recipe = facts("longlive1", name)["weight_recipe"]
    return full(name, int(recipe.split("PCG64(")[1].split(")")[0]))


def within(facts, name, key):
    """Tolerance of one output of a golden case, as arguments of assert_allclose."""
    case = facts("longlive1", name)
    return {"rtol": 0, "atol": case["tolerance"][f"out/{key}"]["atol"], "err_msg": key}


def frame_count(model, z, *, first):
    """How many frames a stream makes of these latents; nothing is compiled."""
    height, width = (n * model.cfg.space_stride for n in z.shape[2:4])
    carry = jax.eval_shape(lambda: vae.init_carry(model, 1, height, width))
    run = functools.partial(vae.stream, first=first)
    return jax.eval_shape(run, model, carry, z)[0].shape[1]


def latents(kind, frames, seed=1):
    rows, columns, channels = LATENT_SHAPE[kind]
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(2, frames, rows, columns, channels)), jnp.float32)


def test_M_lightvae(golden, facts):
    case, name = golden("longlive1", "M_lightvae"), "M_lightvae"
    statistics = {k: tuple(map(float, case[f"in/{k}"])) for k in ("mean", "std")}
    tensors = export(zeros(SMALL_LIGHT), wan_vae.rows(SMALL_LIGHT))  # the case decodes only
    given = {k[2:]: v for k, v in case.items() if k.startswith("w/")}
    assert given.keys() == {k for k in tensors if k.startswith(("decoder.", "conv2."))}
    tensors |= given
    cfg = wan_vae.infer(tensors, lambda name: tensors[name].shape, "wan")
    assert cfg == SMALL_LIGHT
    cfg = dataclasses.replace(cfg, **statistics)
    model = fill(abstract(cfg), wan_vae.rows(cfg), tensors)
    z, start = video_like(case["in/z"]), 0
    carry = vae.init_carry(model, 1, 32, 32)
    for i, n in enumerate(facts("longlive1", name)["config"]["chunks"]):
        got, carry = stream(model, carry, z[:, start : start + n], first=i == 0)
        want = np.clip(video_like(case[f"out/stream_chunk{i}"]), -1, 1)
        np.testing.assert_allclose(got, want, **within(facts, name, f"stream_chunk{i}"))
        start += n
    assert start == z.shape[1]


@pytest.mark.parametrize("name", FULL)
def test_full_size_tae(golden, facts, name):
    case, model = golden("longlive1", name), full_size(name, facts)
    z, size = channel_last(case["in/z"]), model.cfg.patch
    whole = case["out/decoder_preclamp"]  # b t (c q r) h w
    b, t, _, h, w = whole.shape
    whole = whole.reshape(b, t, 3, size, size, h, w).transpose(0, 1, 5, 3, 6, 4, 2)
    whole = whole.reshape(b, t, h * size, w * size, 3)
    got, video = frames_and_video(model, z)
    np.testing.assert_allclose(got, whole, **within(facts, name, "decoder_preclamp"))

    # The reference drops the first three frames of a stream; its black is 0 and its white 1.
    want = 2 * np.clip(whole[:, 3:], 0, 1) - 1
    limit = within(facts, name, "decoded")
    limit["atol"] *= 2
    np.testing.assert_allclose(video, want, **limit)
    counts = [frame_count(model, z[:, i : i + 1], first=i == 0) for i in range(z.shape[1])]
    assert counts == case["out/stream_frames_per_latent"].tolist()

    video = 2 * channel_last(case["in/video"]) - 1
    want = channel_last(case["out/encoded"])
    np.testing.assert_allclose(encode(model, video), want, **within(facts, name, "encoded"))


@pytest.mark.parametrize("chunks", [(1, 1, 2), (3, 1)], ids=str)
def test_tae_streaming_equals_whole(chunks):
    model, scale = small("tae"), 16
    z = latents("tae", sum(chunks))
    whole = decode(model, z)
    assert whole.shape == (2, 1 + 4 * (sum(chunks) - 1), 2 * scale, 2 * scale, 3)
    carry, frames, first = vae.init_carry(model, 2, 2 * scale, 2 * scale), [], True
    spec = [(x.shape, x.dtype) for x in jax.tree.leaves(carry)]
    for part in np.split(z, np.cumsum(chunks)[:-1], 1):
        video, carry = stream(model, carry, part, first=first)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(carry)] == spec
        frames.append(video)
        first = False
    np.testing.assert_allclose(jnp.concatenate(frames, 1), whole, rtol=0, atol=1e-5)
    assert np.abs(whole).min() < 0.9 and np.std(whole) > 0.01  # neither all clamped nor all grey


@pytest.mark.parametrize("kind", LATENT_SHAPE)
def test_bfloat16_weights_decode_a_session_of_float32(kind):
    z = latents(kind, 1)
    model = dataclasses.replace(TINY, height=32, width=32)
    half = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(jnp.bfloat16)), small(kind))
    carry = vae.init_carry(half, 2, model.height, model.width)
    carry, got = rollout.decode(half, carry, z, first=False)
    want, _ = stream(small(kind), vae.init_carry(small(kind), 2, 32, 32), z, first=False)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(carry))
    difference = np.abs(np.asarray(got, np.float32) / 127.5 - 1 - want)
    assert 0 < difference.mean() < 0.02


def test_tae_black_is_minus_one_and_white_is_one():
    model = zeros(SMALL_TAE)
    for level, want in ((-0.5, -1.0), (0.0, -1.0), (0.25, -0.5), (1.0, 1.0), (2.0, 1.0)):
        bias = jnp.full_like(model.decoder.conv_out.bias[...], level)
        model.decoder.conv_out.bias.set_value(bias)
        np.testing.assert_array_equal(decode(model, latents("tae", 1)), want)


def test_tae_encodes_whole_clips_only():
    model = small("tae")
    with pytest.raises(ValueError, match="4 frames do not fill latents"):
        vae.encode(model, jnp.zeros((1, 4, 16, 16, 3)))
    with pytest.raises(InputError, match="whole clips only"):
        vae.encode_stream(model, None, jnp.zeros((1, 1, 16, 16, 3)), first=True)
    with pytest.raises(InputError, match="whole clips only"):
        vae.init_encode_carry(model, 1, 16, 16)


@pytest.mark.parametrize("kind", LATENT_SHAPE)
def test_name_table_round_trip_is_exact(kind):
    cfg, rows = tables()[kind]
    tensors = drawn(specs(cfg, rows), 3)
    back = export(fill(abstract(cfg), rows, tensors), rows)
    assert back.keys() == tensors.keys()
    for key, x in tensors.items():
        assert back[key].shape == x.shape and np.array_equal(back[key], x), key
    missing = dict(tensors)
    del missing["decoder.conv_in.bias" if kind == "light" else "decoder.22.bias"]
    with pytest.raises(NameMismatch, match="missing: decoder"):
        fill(abstract(cfg), rows, missing)


@pytest.mark.parametrize("cfg", [WAN21_TAE, WAN22_TAE, SMALL_TAE], ids=["2.1", "2.2", "small"])
def test_tae_config_follows_from_the_shapes(cfg):
    found = specs(cfg, names.rows(cfg))
    assert names.matches(found)
    assert names.config(found) == cfg


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
@pytest.mark.parametrize("width", [(80, 128), (40, 64)], ids=["0.5", "0.75"])
def test_light_config_follows_from_the_shapes(layout, width):
    cfg = dataclasses.replace(WAN22_VAE, encoder_dim=width[0], decoder_dim=width[1])
    rows = {"wan": wan_vae.rows, "diffusers": wan_vae.rows_diffusers}[layout](cfg)
    found = specs(cfg, rows)
    assert wan_vae.infer(found, lambda name: found[name].shape, layout) == cfg


@pytest.mark.parametrize("wrapper", ["", "state_dict.", "gen_model.", "gen_model.generator."])
def test_light_names_are_unwrapped(wrapper):
    own = ["encoder.conv_in.weight", "quant_conv.bias"]
    beside = [f"{wrapper}dynamic_feature_projection_heads.0.weight"]
    beside += ["gen_model.discriminator.conv.weight"] if "generator" in wrapper else []
    found = [wrapper + name for name in own]
    assert light.unwrap([*found, *beside]) == dict(zip(own, found, strict=True))
    assert light.names([*beside, *found]) == found


def test_decoders_survive_json():
    half = dataclasses.replace(WAN22_VAE, encoder_dim=80, decoder_dim=128)
    cfg = dataclasses.replace(TINY, decoders=(("light", half), ("tae", WAN22_TAE)))
    data = json.loads(json.dumps(config.to_json(cfg)))
    assert {name: part["kind"] for name, part in data["decoders"].items()} == {
        "light": "wan",
        "tae": "tae",
    }
    back = config.from_json(data)
    assert back == cfg and hash(back) == hash(cfg)
    assert back.decoder("full") == cfg.vae and back.decoder("tae") == WAN22_TAE
    old = config.to_json(TINY)
    del old["decoders"]
    assert config.from_json(old) == TINY
