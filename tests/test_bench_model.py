"""Models that no file holds: every suite runs them through the command, none without memory."""

import dataclasses
import json

import fake
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streams
import training
from flax import nnx
from test_report import HEAD, check_schema

from longlive_jax import (
    bench_convolutions,
    bench_model,
    bench_session,
    bench_train,
    bench_vae,
    cli,
    footprint,
    plan,
    report,
)
from longlive_jax.bench_session import Effort
from longlive_jax.config import WAN21_TAE, WAN22_TAE, TAEConfig
from longlive_jax.dit.model import DiT
from longlive_jax.errors import InputError
from longlive_jax.vae import vae as coder
from longlive_jax.vae.layers import CausalConv

RANDOM = ["--preset", "tiny", "--random_weights"]


@pytest.fixture
def small(monkeypatch):
    """The preset called tiny becomes a smaller model, drawn without a program for each shape."""
    rng = np.random.default_rng(0)

    def drawn(key, shape, dtype, largest):
        return jnp.asarray(rng.uniform(-largest, largest, shape), dtype)

    monkeypatch.setitem(plan.PRESETS, "tiny", training.SMALL)
    monkeypatch.setattr(bench_model, "_uniform", drawn)


def nobody(name, **_):
    raise AssertionError(f"{name} was loaded")


@pytest.fixture
def longlive(tmp_path, capsys):
    """Runs the command; nobody may load weights."""

    def run(*arguments):
        path = tmp_path / "report.json"
        code = cli.run(["bench", *arguments, "--json", str(path)], load=nobody)
        said = json.loads(path.read_text("utf-8")) if path.exists() else None
        return code, said, capsys.readouterr()

    return run


def test_weights_are_drawn_in_the_shapes_of_the_model():
    cfg = dataclasses.replace(training.SMALL.dit, layers=3)
    abstract = nnx.eval_shape(lambda: DiT(cfg, rngs=nnx.Rngs(0)))
    dit = bench_model.drawn(abstract, jax.random.key(0), jnp.bfloat16)
    for ours, theirs in zip(jax.tree.leaves(dit), jax.tree.leaves(abstract), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, jnp.dtype(jnp.bfloat16))
    # Matrices of variance 1 / inputs, of which the layers are none; nothing in biases.
    kernel = np.asarray(dit.blocks.ffn_out.kernel[...], np.float32)
    assert kernel.std() * cfg.ffn_dim**0.5 == pytest.approx(1, abs=0.05)
    assert not np.allclose(kernel[0], kernel[1])
    assert (np.asarray(dit.blocks.norm.scale[...]) == 1).all()
    assert (np.asarray(dit.head.bias[...]) == 0).all()


def test_without_a_transformer_it_is_there_by_shape(small):
    model = bench_model.load("tiny", transformer=False)
    assert {x.dtype for x in jax.tree.leaves(model.vae)} == {jnp.dtype(jnp.float32)}
    assert {type(x) for x in jax.tree.leaves(model.dit)} == {jax.ShapeDtypeStruct}


def test_prompts_become_embeddings_that_stay_the_same(small):
    text = bench_model.load("tiny").text
    one, again, other = text(["a dot"]), text(["a dot"]), text(["a square"])
    assert one.shape == (1, training.SMALL.dit.text_len, training.SMALL.dit.text_dim)
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)


def test_presets_get_the_faster_decoders_of_their_latents():
    """A LightVAE's widths are those of Wan2.2's, halved or quartered; Wan2.1 has none."""
    found = {name: dict(bench_model.sized(cfg).decoders) for name, cfg in plan.PRESETS.items()}
    assert found["wan21_1_3b"] == {"tae": WAN21_TAE}
    light, quarter, tae = (found["wan22_5b"].pop(n) for n in ("light", "light_quarter", "tae"))
    assert tae == WAN22_TAE and not found["wan22_5b"]
    assert [(x.encoder_dim, x.decoder_dim) for x in (light, quarter)] == [(80, 128), (40, 64)]


def test_a_video_of_random_weights_is_measured(small, longlive):
    code, said, _ = longlive(*RANDOM, "--repeat", "1", "--seconds", "1", "--steps", "2")
    assert code == 0
    check_schema(said)
    assert (said["suite"], said["model"], said["steps"]) == ("generate", "small", 2)
    assert "random" in said["weights"] and "no text encoder" in said["weights"]


def test_fewer_bits_are_measured_on_random_weights(small, longlive):
    flags = ["--precision", "int8", "--kv", "int8", "--change", "none"]
    code, said, _ = longlive(*RANDOM, *flags, "--repeat", "1", "--seconds", "0.5")
    assert (code, said["switches"]) == (0, [])


def test_decoders_are_measured_stage_by_stage(small, longlive, monkeypatch):
    two = dict(list(bench_convolutions.WAYS.items())[:2])
    monkeypatch.setattr(bench_convolutions, "WAYS", two)
    code, said, out = longlive("--suite", "vae", *RANDOM, "--repeat", "1")
    assert code == 0
    assert list(said)[: len(HEAD)] == list(HEAD) and said["suite"] == "vae"
    assert list(said["decoders"]) == ["full float32", "full bfloat16"]
    for found in said["decoders"].values():
        assert list(found["stages"]) == ["in", "middle", "up 1", "up 2", "up 3", "out"]
        assert found["stages_s"] == pytest.approx(sum(found["stages"].values()))
        assert 0 < found["best_s"] <= found["chunk_s"]
        assert found["fps"] == pytest.approx(said["frames"] / found["chunk_s"])
        assert found["temporary_bytes"] > 0
        assert list(found["convolutions"]) == ["middle", "up 1", "up 2", "up 3"]
        for ways in found["convolutions"].values():
            assert list(ways) == list(two) and min(ways.values()) > 0
    assert max(found["compile_s"] for found in said["decoders"].values()) > 0
    assert said["ratios"]["full float32"] == 1.0 and said["refused"] == {}
    assert "decoders: full bfloat16" in out.out


@pytest.mark.parametrize("name", bench_convolutions.WAYS)
def test_ways_of_convolving_mean_the_same(name):
    """As the layer does it, whose kernel has time behind space."""
    one, two = jax.random.split(jax.random.key(0))
    x = jax.random.normal(one, (2, 5, 4, 6, 3))
    layer = CausalConv(3, 7, (3, 3), rngs=nnx.Rngs(0))
    kernel = jax.random.normal(two, layer.kernel.shape)
    layer.kernel[...] = kernel
    expected, _ = layer(x[:, 2:], x[:, :2], False)
    found = bench_convolutions.WAYS[name](x, jnp.moveaxis(kernel, 2, 0))
    np.testing.assert_allclose(found, expected, atol=1e-4)


SMALL_TAE = TAEConfig(latent_channels=4, encoder_dim=4, decoder_dims=(8, 4, 4, 4), blocks=1)


@pytest.mark.parametrize("cfg", [training.SMALL.vae, SMALL_TAE], ids=["wan", "tae"])
def test_stages_are_the_decoder(cfg):
    """One after the other they make the frames that `stream` makes, and its carry."""
    vae = bench_model.decoder(cfg, jax.random.key(0), jnp.float32)
    decode = streams.jit(coder.stream, static_argnames="first")
    x = jax.random.normal(jax.random.key(0), (1, 2, 2, 2, 4))
    side = 2 * cfg.space_stride
    _, carry = decode(vae, coder.init_carry(vae, 1, side, side), x, first=False)
    frames, after = decode(vae, carry, x, first=False)
    parts = []
    for _, stage, part in bench_vae.stages(vae, carry.layers):
        x, part = streams.jit(stage)(vae, x, part)
        parts.append(part)
    np.testing.assert_allclose(x, frames, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(parts), jax.tree.leaves(after.layers), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_decoder_without_room_is_named(small, monkeypatch):
    model = bench_model.load("tiny", transformer=False)
    monkeypatch.setattr(report, "free_memory", lambda: 0)
    found = bench_vae.run(model, repeat=1, seed=0)
    assert found.decoders == {} == found.ratios
    assert set(found.refused) == {"full float32", "full bfloat16"}


def test_training_steps_of_random_weights_are_measured(small, longlive, monkeypatch):
    run = bench_train.run
    monkeypatch.setattr(bench_train, "REMAT", {"nothing": None})
    for part in ("attentions", "spreads"):  # as for any model: tests/test_bench_train.py
        monkeypatch.setattr(bench_train, part, lambda *_: {})
    monkeypatch.setattr(
        bench_train, "run", lambda model, **given: run(model, **given, batch=1, ranks=(1,))
    )
    flags = ["--suite", "train", "--seconds", "0.5", "--repeat", "1"]
    code, said, _ = longlive(*RANDOM, *flags)
    assert code == 0
    assert said["remat"]["nothing"]["step_s"] > 0
    assert "random" in said["weights"]


def test_sessions_of_random_weights_are_measured(small, longlive, monkeypatch):
    run, ways = bench_session.run, {"keep": bench_session.WAYS["keep"]}
    little = Effort(trials=1, sizes=(1,), rounds=1)
    monkeypatch.setattr(bench_session, "WAYS", ways)
    monkeypatch.setattr(
        bench_session, "run", lambda model, **given: run(model, **given, effort=little)
    )
    code, said, _ = longlive(*RANDOM, "--suite", "session", "--seconds", "5.5", "--repeat", "1")
    assert code == 0
    assert said["compiled_while_measuring"] == 0 and said["saved_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "tiny"], "add --random_weights"),
        (["--random_weights"], "say --preset"),
        (["--preset", "huge", "--random_weights"], "huge"),
        ([*RANDOM, "--model", "."], "leave --model and --lora out"),
        ([*RANDOM, "--vae", "light"], 'has no VAE "light", only full'),
        ([*RANDOM, "--suite", "vae", "--kv", "int8"], "--kv says nothing of --suite vae"),
        ([*RANDOM, "--suite", "train", "--steps", "2"], "--steps says nothing of --suite train"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(longlive, arguments, words):
    code, said, out = longlive(*arguments)
    assert (code, said) == (2, None)
    assert words in out.err and out.err.count("\n") == 1


@pytest.mark.parametrize("suite", ["generate", "vae", "train"])
def test_a_machine_without_memory_is_told_before_anything_is_drawn(longlive, monkeypatch, suite):
    monkeypatch.setattr(report, "free_memory", lambda: 10**6)
    monkeypatch.setattr(bench_model, "drawn", None)  # would fail
    code, _, out = longlive(*RANDOM, "--suite", suite)
    assert code == 2
    assert f"--preset tiny --suite {suite} needs" in out.err and "0.00 GB" in out.err
    assert out.err.count("\n") == 1


def test_what_is_needed_follows_from_the_plan():
    """In float32 twice as much as planned, without a text encoder."""
    ask = plan.Ask("tiny", 10.0)
    # With the kernels of the device at hand, where a plan is for a GPU.
    programs = footprint.by_formula(ask.config, None, ("denoise", "decode", "switch"))
    planned = plan.resident(ask, programs)
    peak = planned.peak(switch=True) - planned.weights.text
    assert bench_model.needed(ask, "generate", True) == 2 * peak
    assert bench_model.needed(ask, "generate", False) <= 2 * peak
    low = plan.Ask("tiny", 10.0, kv="nvfp4")
    assert bench_model.needed(low, "generate", False) < bench_model.needed(ask, "generate", False)
    held = bench_model.needed(plan.Ask("wan21_1_3b", 12.0), "train", True)
    # Weights, their average, two moments and gradients in float32, beside those of the model.
    assert 1.4e9 * 4 * 6 < held < 1.5e9 * 4 * 6


def test_a_named_model_is_loaded_as_ever(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(bench_vae, "run", lambda model, **given: asked.append((model, given)))
    monkeypatch.setattr(report, "show", lambda summary, to_stderr: None)
    model = fake.Model()
    with pytest.raises(AttributeError):  # of a report that is none
        cli.run(["bench", "--suite", "vae"], load=lambda name: model)
    assert asked == [(model, dict(repeat=3, seed=0))]


def test_an_unknown_preset_is_refused_by_the_library_too():
    with pytest.raises(InputError, match="has no VAE"):
        bench_model.load("wan21_1_3b", vae="light", transformer=False)
