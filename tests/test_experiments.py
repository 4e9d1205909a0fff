"""The configs of experiments say what they mean."""

import importlib.util
import pathlib
import types
import warnings

import pytest
import scripts
from longlive_kernels.nvfp4.linear import AR

from longlive_jax import model as models
from longlive_jax.config import TINY, WAN21_T2V_1_3B, WAN22_TI2V_5B
from longlive_jax.errors import InputError
from longlive_jax.train import distill_run
from longlive_jax.train.recycling import RecyclingConfig

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"


def module(path):
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), FOLDER / f"{path}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def train_ar():
    """Its flags are defined once; ml_collections reads their default in a way of Python 3.11."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return module("train_ar")


def test_rows_that_are_asked_for_come_with_what_they_are_compared_with():
    compare = scripts.load("compare")
    rows = [compare.Row("as it is"), compare.Row("a", like="as it is"), compare.Row("b")]
    assert compare.chosen(rows, []) == rows
    assert compare.chosen(rows, ["a"]) == rows[:2]
    with pytest.raises(InputError, match="there is no row 'c': there are 'as it is', 'a', 'b'"):
        compare.chosen(rows, ["a", "c"])


def model(config):
    return types.SimpleNamespace(config=config)


@pytest.mark.parametrize("which", ["tune", "recycled", "nvfp4", "clip", "direct"])
def test_the_toy_configs_are_runs(train_ar, which):
    toy = module("configs/ar_toy")
    assert sorted(toy.CHANGES) == ["clip", "direct", "nvfp4", "recycled", "tune"]
    run = train_ar.config_of(toy.get_config(which), model(TINY))
    assert (run.recycling is not None) == (which == "recycled")
    assert run.nvfp4 == (AR if which == "nvfp4" else None)
    stream = run.ar.stream
    frames = run.source.chunks * stream.chunk
    if which == "clip":  # one chunk: everything sees everything
        assert (frames, stream.window, stream.sink, run.fresh) == (12, 12, 0, True)
    else:
        assert (frames, stream) == (48, TINY.stream)


@pytest.mark.parametrize("which", ["5b-16", "5b-64-nvfp4", "1.3b-32"])
def test_the_wan_configs_are_runs(train_ar, which):
    run = train_ar.config_of(module("configs/ar_wan").get_config(which), model(WAN22_TI2V_5B))
    assert run.recycling == RecyclingConfig()
    assert (run.nvfp4 is not None) == which.endswith("nvfp4")
    assert run.source.batch * run.source.parts == 16 and run.seq == 4


def test_a_field_that_there_is_none_of_is_named(train_ar):
    config = module("configs/ar_toy").get_config()
    config.optimizer.momentum = 0.5
    with pytest.raises(InputError, match="the config does not fit: .*momentum"):
        train_ar.config_of(config, model(TINY))


@pytest.fixture(scope="module")
def distillation():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return module("distillation")


DISTILLED = [
    *(("dmd_toy", which, TINY) for which in ("steps4", "steps2", "full4", "full2")),
    *(("long_toy", which, TINY) for which in ("switch", "plain")),
    *(("dmd_wan", which, WAN22_TI2V_5B) for which in ("5b-4", "5b-2", "5b-4-nvfp4", "5b-2-nvfp4")),
    *(("long_wan", which, WAN21_T2V_1_3B) for which in ("init", "long")),
]


@pytest.mark.parametrize("name, which, config", DISTILLED)
def test_the_stages_of_distillation_are_runs(distillation, monkeypatch, name, which, config):
    monkeypatch.setattr(models, "read_config", lambda folder: config)
    made = module(f"configs/{name}")
    assert which in made.CHANGES
    run = distillation.config_of(made.get_config(which))
    distill_run.check(run)
    assert run.stream == config.stream and run.judge.shift == config.sampler.shift
    assert (run.prompts.switch is not None) == (which in ("switch", "long"))
    whole = which.startswith("full") or which == "init"
    assert (run.student.learning.rank == 0) == whole
    assert dict(run.precision) == (
        dict(student="nvfp4", teacher="nvfp4") if which.endswith("nvfp4") else {}
    )
    assert run.judge.causal == (name != "long_wan")


def test_clips_are_made_and_judged_by_one_kernel(distillation):
    config = module("configs/dmd_toy").get_config()
    config.attention = "xla"
    run = distillation.config_of(config)
    assert run.stream.attention == run.judge.attention == "xla"


def test_a_distillation_that_does_not_fit_is_named(distillation):
    config = module("configs/dmd_toy").get_config("steps2")
    config.clips.next = 5
    with pytest.raises(InputError, match="clips of 4 and 5 chunks do not fit sequences of 4"):
        distillation.config_of(config)
