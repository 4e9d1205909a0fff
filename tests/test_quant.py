"""Matrices in fewer bits: products, which layers, files, sessions, the command."""

import dataclasses
import functools
import json
import re
import warnings

import fake
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streams
import training
from longlive_kernels.nvfp4.format import swizzle

import longlive_jax
from longlive_jax import cli, layers, lora, weights
from longlive_jax.config import Precision
from longlive_jax.convert.lora import LINEARS
from longlive_jax.errors import EmulationWarning, InputError
from longlive_jax.quant import files, kernels, transformer

KINDS = ("int8", "fp8", "nvfp4")
# Relative error of a product of normal numbers in W8A8 and W4A4: the rounding of either side.
ERRORS = {"int8": 0.02, "fp8": 0.05, "nvfp4": 0.16}
BLOCKS = [path for path in LINEARS if path.startswith("blocks.")]


make = functools.partial(streams.jit, static_argnames=("kind", "how"))(kernels.make)
product = streams.jit(layers.product)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def relative(ours, theirs):
    return float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_as_near_as_its_bits_allow(kind, weights_only):
    x, kernel = normal(2, 8, 64), normal(64, 32, seed=1) * jnp.exp(normal(32, seed=2))
    made = make(kernel, kind, Precision.of(kind, weights_only=weights_only))
    assert made.shape == kernel.shape
    expected = product(kernel, x)
    error = relative(product(made, x), expected)
    assert 0 < error < ERRORS[kind]
    if weights_only:
        exact = product(made.dense().astype(x.dtype), x)
        np.testing.assert_allclose(product(made, x), exact, atol=1e-4)
        both = make(kernel, kind, Precision.of(kind))
        assert error < relative(product(both, x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_a_stack_are_quantised_each_by_itself(kind):
    stack = normal(3, 32, 16) * jnp.array([1.0, 10.0, 100.0])[:, None, None]
    how = Precision.of(kind)
    made = make(stack, kind, how)
    for i in range(3):
        alone = make(stack[i], kind, how)
        for ours, theirs in zip(jax.tree.leaves(made[i]), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_is_not_changed_by_its_neighbours(kind):
    kernel = make(normal(32, 16), kind, Precision.of(kind))
    x = normal(2, 4, 32) * jnp.array([1.0, 50.0])[:, None, None]
    np.testing.assert_allclose(product(kernel, x)[:1], product(kernel, x[:1]), rtol=1e-5, atol=1e-5)


def test_scales_of_the_wrong_layout_change_the_product():
    """It went wrong for others in silence: scales in the order of tensor cores read as rows."""
    kernel, x = normal(128, 128) * jnp.exp(normal(128, seed=3)), normal(1, 4, 128)
    right = make(kernel, "nvfp4", Precision.of("nvfp4", weights_only=True))
    wrong = dataclasses.replace(right, scales=swizzle(right.scales).reshape(right.scales.shape))
    expected = product(kernel, x)
    errors = [relative(product(way, x), expected) for way in (right, wrong)]
    assert errors[0] < 0.2 and errors[1] > 2 * errors[0]


def test_patterns_choose_layers_and_the_first_that_fits_decides():
    how = Precision(
        (("blocks.ffn_*", "int8"), ("blocks.cross_attn.*", "bf16"), ("blocks.*", "fp8"))
    )
    found = transformer.kinds(how)
    assert {found[path] for path in found if ".ffn_" in path} == {"int8"}
    assert not any("cross_attn" in path for path in found)
    assert found["blocks.self_attn.q"] == "fp8"
    assert sorted(transformer.kinds(Precision.of("nvfp4"))) == sorted(BLOCKS)
    assert len(BLOCKS) == 10
    with pytest.raises(InputError, match='no linear layer is called "block.*"'):
        transformer.kinds(Precision((("block.*", "fp8"),)))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Of 1 block, 32 wide, float32."""
    return training.write_model(tmp_path_factory.mktemp("model"))


def kinds_of(dit):
    leaves = {path: getattr(x, "kernel", x) for path, x in weights.flatten(dit).items()}
    return {p: type(x).__name__ for p, x in leaves.items() if isinstance(x, kernels.Kernel)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_folder_is_the_model_quantised(kind, small, tmp_path):
    how = Precision.of(kind)
    files.run(small, tmp_path / "made", how)
    loaded = longlive_jax.load(tmp_path / "made")
    assert loaded.config.precision == how
    model = longlive_jax.load(small).quantized(kind)
    assert len(kinds_of(loaded.dit)) == 10 and kinds_of(loaded.dit) == kinds_of(model.dit)
    ours, theirs = (weights.arrays(weights.flatten(m.dit)) for m in (loaded, model))
    for name, x in ours.items():
        assert x.dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(
            np.asarray(x, np.float32), np.asarray(theirs[name], np.float32), err_msg=name
        )
    frames = [m.session("a red circle").next_chunk() for m in (loaded, model)]
    np.testing.assert_array_equal(*frames)
    kept = sum(x.nbytes for name, x in ours.items() if ".kernel." in name)
    plain = sum(
        x.size * 2
        for name, x in weights.flatten(longlive_jax.load(small).dit).items()
        if name.removesuffix(".kernel") in BLOCKS
    )
    assert kept < (0.3 if kind == "nvfp4" else 0.6) * plain


def test_what_cannot_be_quantised_is_said_so_and_nothing_is_written(small, tmp_path):
    how = Precision.of("nvfp4")
    files.run(small, tmp_path / "once", how)
    with pytest.raises(InputError, match="are in fewer bits already"):
        files.run(tmp_path / "once", tmp_path / "twice", how)
    model = longlive_jax.load(small)
    with pytest.raises(InputError, match="are in fewer bits already"):
        model.quantized("int8").quantized("int8")
    with pytest.raises(InputError, match="choose bf16, int8, fp8, nvfp4"):
        model.quantized("int4")
    with pytest.raises(InputError, match="tile 3: choose 1 or 16"):
        model.quantized("nvfp4", tile=3)
    (tmp_path / "once" / "note").touch()
    with pytest.raises(InputError, match="once"):
        files.run(small, tmp_path / "once", how)
    assert not (tmp_path / "twice").exists()
    odd = {f"{path}.kernel": (2, 32, 32) for path in BLOCKS} | {"blocks.ffn_in.kernel": (2, 24, 32)}
    with pytest.raises(InputError, match="blocks.ffn_in is 24 x 32: nvfp4 needs multiples of 16"):
        transformer.check(odd, how)


def test_a_lora_stays_beside_a_quantised_kernel(small):
    model = longlive_jax.load(small)
    adapter = lora.init(model.dit, 2, jax.random.key(0))
    adapter = dataclasses.replace(adapter, b={k: v + 0.1 for k, v in adapter.b.items()})
    both = transformer.quantize(lora.apply(model.dit, adapter), Precision.of("int8"))
    after = lora.apply(transformer.quantize(model.dit, Precision.of("int8")), adapter)
    for ours, theirs in zip(jax.tree.leaves(both), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(kinds_of(both)) == 10


def test_a_saved_session_comes_back_in_its_precision(small, tmp_path):
    model = longlive_jax.load(small).quantized("nvfp4").streaming(kv="int8")
    session = model.session("a red circle")
    session.next_chunk()
    session.save(tmp_path / "session")
    restored = longlive_jax.restore(tmp_path / "session")
    assert restored.model.origin.precision == Precision.of("nvfp4")
    np.testing.assert_array_equal(restored.next_chunk(), session.next_chunk())


def test_a_quantised_folder_is_loaded_for_its_weights_alone(small, tmp_path):
    """Every kernel, and a session of it when it comes back."""
    files.run(small, tmp_path / "made", Precision.of("nvfp4"))
    model = longlive_jax.load(tmp_path / "made", weights_only=True)
    asked = longlive_jax.load(small).quantized("nvfp4", weights_only=True)
    assert model.config == asked.config
    assert jax.tree.structure(model.dit) == jax.tree.structure(asked.dit)
    session = model.session("a red circle")
    frames = session.next_chunk()
    np.testing.assert_array_equal(frames, asked.session("a red circle").next_chunk())
    session.save(tmp_path / "session")
    restored = longlive_jax.restore(tmp_path / "session")
    assert restored.model.config.precision.weights_only
    np.testing.assert_array_equal(restored.next_chunk(), session.next_chunk())


@pytest.mark.parametrize("how", ["quantized", "load", "generate"])
def test_emulated_products_are_told_once(how, small, tmp_path, monkeypatch, capsys):
    """Not where weights alone are in four bits, nor of other kinds."""
    files.run(small, tmp_path / "made", Precision.of("nvfp4"))
    model = longlive_jax.load(small)
    assert transformer.here() == ("cpu", None)
    monkeypatch.setattr(transformer, "here", lambda: ("gpu", "sm_90"))
    said = "emulated on sm_90, which has no FP4 units.*--weights_only"
    if how == "generate":
        out = ["--output", str(tmp_path / "a.mp4"), "--prompt", "a red circle", "--seconds", "1"]
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # as for users
            assert cli.run(["generate", "--model", str(tmp_path / "made"), *out]) == 0
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("longlive: ")]
        assert len(lines) == 1 and re.search(said, lines[0])
        return
    call = {
        "quantized": model.quantized,
        "load": lambda _, **how: longlive_jax.load(tmp_path / "made", **how),
    }[how]
    with pytest.warns(EmulationWarning, match=said) as found:
        call("nvfp4")
    assert len(found) == 1
    call("nvfp4", weights_only=True)
    model.quantized("int8")


def test_the_command_writes_a_folder(small, tmp_path, capsys):
    arguments = ["quantize", "--model", str(small), "--output", str(tmp_path / "made")]
    assert cli.run([*arguments, "--precision", "nvfp4", "--layers", "blocks.ffn_*=int8"]) == 0
    said = json.loads((tmp_path / "made" / "config.json").read_text())["precision"]
    assert said["layers"] == [["blocks.ffn_*", "int8"], ["blocks.*", "nvfp4"]]
    assert cli.run(arguments) == 2
    assert "say in what" in capsys.readouterr().err
    assert cli.run([*arguments, "--layers", "blocks.*=int2"]) == 2
    assert "choose bf16, int8, fp8, nvfp4" in capsys.readouterr().err


def test_commands_that_run_a_model_take_precision_and_kv(monkeypatch, capsys):
    asked = []

    class Model(fake.Model):
        def quantized(self, kind, **choices):
            asked.append((kind, choices))
            return self

        def streaming(self, **choices):
            asked.append(choices)
            return self

    from longlive_jax.eval import run

    monkeypatch.setattr(run, "toy", lambda model, **_: {"colour": 1})
    flags = ["--precision", "nvfp4", "--weights_only", "--kv", "int8"]
    assert cli.run(["eval", *flags], load=lambda name: Model()) == 0
    assert asked == [("nvfp4", {"weights_only": True}), {"kv": "int8"}]
    assert cli.run(["eval", "--weights_only"]) == 2
    assert "--weights_only says how --precision is meant" in capsys.readouterr().err
