"""What a training step costs: the report, on the small model."""

import json

import fake
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streams
import training
from longlive_kernels import arch
from test_report import HEAD

import longlive_jax
from longlive_jax import bench_train, cli
from longlive_jax.errors import InputError
from longlive_jax.report import head

SCORES = 4 * (2 * 4 * 4) ** 2 * 8  # float32, 8 heads, 4 clean and 4 noisy frames of 4 tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return longlive_jax.load(training.write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bench_train, "LENGTH", 4)
    monkeypatch.setattr(bench_train, "DENSE", SCORES)
    monkeypatch.setattr(jax, "jit", streams.jit)


def measured(model, **changes):
    asked = dict(seconds=1.0, repeat=1, seed=0, batch=1, ranks=(1, 2)) | changes
    return bench_train.run(model, **asked)


@pytest.mark.long
def test_every_way_is_measured(model):
    """16 pictures are 5 latents, of which two ranks have two each."""
    found = measured(model)
    assert (found.latents, found.batch, found.devices) == (4, 1, 8)
    assert list(found.spread) == ["plain 1", "balanced 1", "plain 2", "balanced 2"]
    assert found.refused == {}
    assert found.spread["balanced 1"].ratio == 1.0
    for spread in found.spread.values():
        assert min(spread.step_s, spread.encode_s, spread.halo_s) > 0
    assert list(found.remat) == ["all", "dots", "nothing"]
    assert min(step.temporary_bytes for step in found.remat.values()) > 0
    assert list(found.attention) == ["xla 2", "reference 2", "xla 4", "reference 4", "xla 8"]
    assert found.attention["reference 4"].forward_bytes >= SCORES
    said = json.loads(found.to_json())
    assert said["spread"]["plain 2"]["ratio"] > 0
    assert list(said)[: len(HEAD)] == list(HEAD) and said["suite"] == "train"


@pytest.mark.parametrize(("sm", "names"), [(None, ["xla"]), (90, ["cudnn", "xla", "mosaic"])])
def test_a_kernel_is_measured_where_it_runs(monkeypatch, sm, names):
    monkeypatch.setattr(arch, "default", lambda: sm)
    args = [jnp.zeros((1, 128, 2, 128), jnp.bfloat16)] * 3
    found = bench_train.able(((True,),), args, dense=False)
    assert found == names
    at = names.index("xla") + 1
    assert bench_train.able(((True,),), args, dense=True) == [*names[:at], "reference", *names[at:]]


def test_every_way_of_encoding_gives_the_same_latents(model):
    given = bench_train.videos(model.config, 1, 4, 0)
    mesh = bench_train.sharding.make_mesh(seq=2)
    ours, theirs = (bench_train.encoder(model, given, mesh, way)() for way in (True, False))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    by_windows = np.concatenate(bench_train.halo_encoder(model, given, 2)(), 1)
    np.testing.assert_allclose(by_windows, theirs, atol=1e-5)


def test_a_sequence_of_fewer_chunks_than_ranks_is_refused(model):
    with pytest.raises(InputError, match="1 latent frames do not divide into 2 ranks"):
        measured(model, seconds=0.07)


def test_what_does_not_fit_is_named():
    refused = {}

    def full():
        raise MemoryError("needs 9.00 GB")

    def wrong():
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    assert bench_train.attempt(refused, "one", lambda x: x, 5) == 5
    assert bench_train.attempt(refused, "remat all", full) is None
    assert refused == {"remat all": "needs 9.00 GB"}
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        bench_train.attempt(refused, "two", wrong)


def test_the_command_asks_for_it(tmp_path, monkeypatch, capsys):
    asked = {}

    def run(model, **given):
        asked.update(given)
        return bench_train.TrainReport(**head("train", model, 0), **facts)

    facts = dict(latents=4, batch=1, repeats=2, spread={}, remat={}, attention={})
    facts |= dict(refused={}, devices=1)
    monkeypatch.setattr(bench_train, "run", run)
    arguments = ["bench", "--suite", "train", "--repeat", "2", "--json", "-"]
    assert cli.run(arguments, load=lambda name: fake.Model()) == 0
    assert asked == dict(seconds=12.0, repeat=2, seed=0)
    assert json.loads(capsys.readouterr().out)["latents"] == 4
