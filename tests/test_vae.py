"""The causal VAE: parity with the references, streaming against whole, gradients, compilations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.config import TINY_VAE, WAN21_VAE, WAN22_VAE, VAEConfig
from longlive_jax.convert import wan_vae
from longlive_jax.convert.table import NameMismatch, export, fill
from longlive_jax.vae import vae as wan
from longlive_jax.vae.fold import duplicate_up, mean_down, patchify, unpatchify

STRIDES = ((1, 2), (2, 2), (2, 2))
SMALL21 = VAEConfig(4, 6, 6, (1, 2, 4, 4), 1, STRIDES)
SMALL22 = VAEConfig(8, 5, 6, (1, 2, 4, 4), 1, STRIDES, patch=2, shortcut=True)
CASES = {"H_vae21": SMALL21, "I_vae22": SMALL22}
# Compiled whole: one program is quicker to compile than its operations one by one.
encode, decode = jax.jit(wan.encode), jax.jit(wan.decode)
posterior = jax.jit(wan.posterior, static_argnames="first")
generate = jax.jit(wan.generate, static_argnames="first")
stream = jax.jit(wan.stream, static_argnames="first")
encode_stream = jax.jit(wan.encode_stream, static_argnames="first")
FAMILY = {"2.1": SMALL21, "2.2": SMALL22, "tiny": TINY_VAE}


def video_like(x):
    """b c t h w -> b t h w c"""
    return jnp.asarray(np.moveaxis(x, 1, -1))


def weights_of(case):
    return {k[2:]: v for k, v in case.items() if k.startswith("w/")}


def abstract(cfg):
    return nnx.eval_shape(lambda: wan.VAE(cfg, rngs=nnx.Rngs(0)))


def load(name, case):
    statistics = {k: tuple(map(float, case[f"in/{k}"])) for k in ("mean", "std")}
    cfg = dataclasses.replace(CASES[name], **statistics)
    return fill(abstract(cfg), wan_vae.rows(cfg), weights_of(case))


@functools.cache
def random_vae(name):
    """Weights drawn by NumPy: the modules' own initialisers compile once per shape."""
    rng = np.random.default_rng(0)
    graph, state = nnx.split(abstract(FAMILY[name]))

    def draw(x):
        fan_in = np.prod(x.shape[:-1]) if len(x.shape) > 1 else 100
        return jnp.asarray(rng.normal(len(x.shape) == 1, fan_in**-0.5, x.shape), jnp.float32)

    return nnx.merge(graph, jax.tree.map(draw, state))


def random(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def within(facts, name, key):
    """Tolerance of one output of a golden case, as arguments of assert_allclose."""
    case = facts("longlive1", name)
    return {"rtol": 0, "atol": case["tolerance"][f"out/{key}"]["atol"], "err_msg": key}


@pytest.mark.parametrize("name", CASES)
def test_encode(golden, facts, name):
    case = golden("longlive1", name)
    vae = load(name, case)
    got = encode(vae, video_like(case["in/video"]))
    want = video_like(case["out/encoded"])
    np.testing.assert_allclose(got, want, **within(facts, name, "encoded"))


@pytest.mark.parametrize("name", CASES)
def test_decode(golden, facts, name):
    case = golden("longlive1", name)
    vae = load(name, case)
    z = wan.denormalise(vae.cfg, video_like(case["in/z"]))
    got = generate(vae, z)[0]
    want = video_like(case["out/decoded"])
    np.testing.assert_allclose(got, want, **within(facts, name, "decoded"))
    clamped = decode(vae, video_like(case["in/z"]))
    np.testing.assert_allclose(clamped, np.clip(want, -1, 1), **within(facts, name, "decoded"))


@pytest.mark.parametrize("name", CASES)
def test_stream_chunks(golden, facts, name):
    case = golden("longlive1", name)
    vae = load(name, case)
    z, carry, start = video_like(case["in/z"]), wan.init_carry(vae, 1, 32, 32), 0
    for i, n in enumerate(facts("longlive1", name)["config"]["chunks"]):
        got, carry = stream(vae, carry, z[:, start : start + n], first=i == 0)
        want = np.clip(video_like(case[f"out/stream_chunk{i}"]), -1, 1)
        np.testing.assert_allclose(got, want, **within(facts, name, f"stream_chunk{i}"))
        start += n
    assert start == z.shape[1]


def test_H_vae21_first_frame_alone_and_without_statistics(golden, facts):
    case = golden("longlive1", "H_vae21")
    vae = load("H_vae21", case)
    video = video_like(case["in/video"])
    mean, logvar, _ = posterior(vae, video)
    assert logvar.shape == mean.shape
    key = "encoded_unscaled"
    np.testing.assert_allclose(
        mean, video_like(case[f"out/{key}"]), **within(facts, "H_vae21", key)
    )
    key = "encoded_first_frame_only"
    got, want = encode(vae, video[:, :1]), video_like(case[f"out/{key}"])
    np.testing.assert_allclose(got, want, **within(facts, "H_vae21", key))


def test_I_vae22_slice_without_carry_is_a_new_video(golden, facts):
    case = golden("longlive1", "I_vae22")
    vae = load("I_vae22", case)
    z = wan.denormalise(vae.cfg, video_like(case["in/z"]))
    key = "decoded_last_slice_without_cache"
    got = generate(vae, z[:, -1:])[0]
    np.testing.assert_allclose(got, video_like(case[f"out/{key}"]), **within(facts, "I_vae22", key))


@pytest.mark.parametrize(
    ("key", "source", "run"),
    [
        ("patchify", "in/patchify_x", lambda x: patchify(x, 2)),
        ("unpatchify", "out/patchify", lambda x: unpatchify(x, 2)),
        ("avgdown_t2_s2", "in/avgdown_x", lambda x: mean_down(x, 12, 2, 2)),
        ("avgdown_t1_s2", "in/avgdown_x", lambda x: mean_down(x, 12, 1, 2)),
        ("avgdown_t1_s1", "in/avgdown_x", lambda x: mean_down(x, 6, 1, 1)),
        ("avgdown_single_frame", "in/avgdown_x", lambda x: mean_down(x[:, :1], 12, 2, 2)),
        ("dupup_t2_s2", "in/dupup_x", lambda x: duplicate_up(x, 4, 2, 2)),
        ("dupup_t2_s2_first", "in/dupup_x", lambda x: duplicate_up(x, 4, 2, 2)[:, 1:]),
        ("dupup_t1_s2", "in/dupup_x", lambda x: duplicate_up(x, 8, 1, 2)),
    ],
)
def test_I_vae22_fold(golden, facts, key, source, run):
    case = golden("longlive1", "I_vae22")
    got = run(video_like(case[source]))
    np.testing.assert_allclose(got, video_like(case[f"out/{key}"]), **within(facts, "I_vae22", key))


@pytest.mark.parametrize("name", CASES)
def test_name_table_round_trip_is_exact(golden, name):
    tensors = weights_of(golden("longlive1", name))
    back = export(load(name, golden("longlive1", name)), wan_vae.rows(CASES[name]))
    assert back.keys() == tensors.keys()
    for key, x in tensors.items():
        assert back[key].shape == x.shape and np.array_equal(back[key], x), key


def test_name_table_refuses_a_missing_tensor(golden):
    tensors = weights_of(golden("longlive1", "H_vae21"))
    del tensors["decoder.upsamples.2.time_conv.bias"]
    with pytest.raises(NameMismatch, match="decoder.upsamples.2.time_conv.bias"):
        fill(abstract(SMALL21), wan_vae.rows(SMALL21), tensors)


@pytest.mark.parametrize("cfg", [WAN21_VAE, WAN22_VAE], ids=["2.1", "2.2"])
def test_full_size_tables_cover_the_model(cfg):
    leaves = nnx.to_flat_state(nnx.state(abstract(cfg), nnx.Param))
    targets = [row.target for row in wan_vae.rows(cfg)]
    assert sorted(targets) == sorted(".".join(map(str, path)) for path, _ in leaves)
    assert len(cfg.mean) == len(cfg.std) == cfg.latent_channels


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1), (3, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_streaming_equals_whole(name, chunks):
    vae, first = random_vae(name), True
    scale = vae.cfg.space_stride
    z = random(2, sum(chunks), 2, 3, vae.cfg.latent_channels) * 0.3
    whole = decode(vae, z)
    assert whole.shape == (2, 1 + 4 * (sum(chunks) - 1), 2 * scale, 3 * scale, 3)
    carry, frames = wan.init_carry(vae, 2, 2 * scale, 3 * scale), []
    back, latents = wan.init_encode_carry(vae, 2, 2 * scale, 3 * scale), []
    for part in np.split(z, np.cumsum(chunks)[:-1], 1):
        video, carry = stream(vae, carry, part, first=first)
        code, back = encode_stream(vae, back, video, first=first)
        frames.append(video)
        latents.append(code)
        first = False
    np.testing.assert_allclose(jnp.concatenate(frames, 1), whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(jnp.concatenate(latents, 1), encode(vae, whole), rtol=0, atol=1e-5)
    assert np.abs(whole).min() < 0.9  # not all of it is clamped


@pytest.mark.parametrize("name", FAMILY)
def test_future_frames_change_nothing(name):
    vae = random_vae(name)
    scale = vae.cfg.space_stride
    video = jnp.tanh(random(1, 13, scale, scale, 3))
    other = video.at[:, 5:].set(0.5)
    a, b = encode(vae, video), encode(vae, other)
    np.testing.assert_allclose(a[:, :2], b[:, :2], rtol=0, atol=1e-6)
    assert np.abs(a[:, 2:] - b[:, 2:]).max() > 1e-3


@pytest.mark.parametrize("name", FAMILY)
def test_gradient_is_finite_and_reaches_every_parameter(name):
    vae = random_vae(name)
    scale = vae.cfg.space_stride
    video = jnp.tanh(random(1, 9, scale, 2 * scale, 3))

    def loss(vae):
        mean, logvar, _ = posterior(vae, video)
        return jnp.mean((generate(vae, mean)[0] - video) ** 2) + jnp.mean(logvar**2)

    gradient = jax.tree.leaves(jax.jit(jax.grad(loss))(vae))
    assert all(np.isfinite(g).all() for g in gradient)
    assert all(np.abs(g).max() > 0 for g in gradient)


def test_one_compilation_and_a_carry_of_one_size_for_any_length():
    vae = random_vae("tiny")
    traces = []

    @functools.partial(jax.jit, static_argnames="first", donate_argnames="carry")
    def step(vae, carry, z, *, first):
        traces.append(first)
        return wan.stream(vae, carry, z, first=first)

    def sizes(carry):
        return [(x.shape, x.dtype) for x in jax.tree.leaves(carry)]

    carry = wan.init_carry(vae, 1, 16, 16)
    start = sizes(carry)
    for i in range(6):
        frames, carry = step(vae, carry, random(1, 3, 2, 2, 16, seed=i), first=i == 0)
        assert frames.shape[1] == (9 if i == 0 else 12)
        assert sizes(carry) == start
    assert traces == [True, False]


def test_wrong_frame_counts_and_sizes_are_named():
    vae = random_vae("tiny")
    with pytest.raises(ValueError, match="12 frames .* expected 1 \\+ a multiple of 4"):
        wan.encode(vae, jnp.zeros((1, 12, 16, 16, 3)))
    with pytest.raises(ValueError, match="16×20 pixels: expected multiples of 8"):
        wan.encode(vae, jnp.zeros((1, 5, 16, 20, 3)))
