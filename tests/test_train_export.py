"""A run as a model's folder."""

import dataclasses
import functools

import numpy as np
import pytest
import training
from training import SMALL, begin, fields

import longlive_jax
from longlive_jax import weights
from longlive_jax.data import toy_folder
from longlive_jax.errors import InputError
from longlive_jax.train import export


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    toy_folder.write(root / "toy", seed=1, samples=2, chunks=2)
    return functools.partial(fields, training.write_model(root / "model"), root / "toy")


def test_a_model_has_the_average_and_streams_as_it_was_trained(tmp_path, given):
    stream = dataclasses.replace(SMALL.stream, attention="xla")
    run = begin(tmp_path / "run", given(optimizer__steps=2, ar__stream=stream))
    state = run.train()
    assert export.run(tmp_path / "run", tmp_path / "made") == 2
    model = longlive_jax.load(tmp_path / "made")
    for name, x in weights.flatten(model.dit).items():
        np.testing.assert_array_equal(x, state.ema[name], err_msg=name)
    began = longlive_jax.load(given()["model"])
    moved = [
        np.abs(np.asarray(x) - np.asarray(weights.flatten(began.dit)[name])).max()
        for name, x in weights.flatten(model.dit).items()
    ]
    assert max(moved) > 0
    assert run.cfg.ar.stream.attention == "xla"
    assert model.config.stream == dataclasses.replace(stream, attention="best")
    assert model.vae_fingerprint == began.vae_fingerprint
    assert model.fingerprint != began.fingerprint
    assert model.session("a red circle").next_chunk().shape == (1, 32, 32, 3)


def test_what_is_no_run_is_refused(tmp_path, given):
    begin(tmp_path / "run", given())  # never trained: the folder is there, and no checkpoint
    with pytest.raises(InputError, match="has no checkpoint yet"):
        export.run(tmp_path / "run", tmp_path / "made")
    with pytest.raises(InputError, match="holds no training run"):
        export.run(tmp_path / "nothing", tmp_path / "made")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(InputError, match="there"):
        export.run(tmp_path / "run", tmp_path / "there")
    assert not (tmp_path / "made").exists()


def test_another_model_at_the_same_place_is_refused(tmp_path, given):
    model = training.write_model(tmp_path / "model")
    begin(tmp_path / "run", given(model=str(model), optimizer__steps=1)).train()
    flat = dict(weights.load(model / "dit.safetensors"))
    flat["patch_embedding.bias"] = flat["patch_embedding.bias"][:3]
    weights.save(model / "dit.safetensors", flat)
    with pytest.raises(InputError, match="step 1 .* is not of such a model"):
        export.run(tmp_path / "run", tmp_path / "made")
    assert not (tmp_path / "made").exists()
