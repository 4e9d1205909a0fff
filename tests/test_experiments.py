"""The configs of experiments say what they mean."""

import importlib.util
import pathlib
import types
import warnings

import pytest
from longlive_kernels.nvfp4.linear import AR

from longlive_jax.config import TINY, WAN22_TI2V_5B
from longlive_jax.errors import InputError
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
