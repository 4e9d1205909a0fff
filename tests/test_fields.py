"""Configs and sessions from files: each field is what it should be, or is named in a sentence."""

import copy
import dataclasses
import json
import math
import os
import shutil

import numpy as np
import pytest
from test_saved import folder as folder  # a fixture
from test_session import tiny as tiny  # a fixture

import longlive_jax
from longlive_jax import config, fields, model, saved
from longlive_jax.config import TINY, WAN21_T2V_1_3B, WAN21_T2V_14B, WAN22_TI2V_5B, StreamConfig
from longlive_jax.errors import InputError
from longlive_jax.text.tokenizer import PieceTokenizer


def plain(cfg):
    return json.loads(json.dumps(config.to_json(cfg)))


def changed(data, path, value):
    data = copy.deepcopy(data)
    *groups, last = path.split(".")
    inner = data
    for name in groups:
        inner = inner[int(name) if isinstance(inner, list) else name]
    inner[int(last) if isinstance(inner, list) else last] = value
    return data


@pytest.mark.parametrize(
    "cfg", [TINY, WAN21_T2V_1_3B, WAN21_T2V_14B, WAN22_TI2V_5B], ids=lambda x: x.name
)
def test_presets_are_read_back(cfg):
    decoders = (("light", cfg.vae), ("tae", config.WAN21_TAE))
    for one in (cfg, dataclasses.replace(cfg, decoders=decoders)):
        assert config.from_json(plain(one)) == one
    config.check_whole(cfg)


WRONG = [
    ("dit.dim", "abc", "dit.dim is a whole number from 1 to 1048576, not 'abc'"),
    ("dit.dim", 2**63, "dit.dim is a whole number"),
    ("dit.dim", True, "dit.dim is a whole number .* not True"),
    ("dit.dim", 256.0, "dit.dim is a whole number .* not 256.0"),
    ("dit.dim", 250, "dit.dim is a multiple of 16"),
    ("dit.eps", math.nan, "dit.eps is a number from 0 to 1, not nan"),
    ("dit.patch", [1, 2], r"dit.patch is a list of 3 \(a whole number"),
    ("dit.patch.1", 0, "dit.patch is a list of 3"),
    ("dit.rope_period", 4, "dit.rope_period is"),
    ("dit", None, "dit is a group of fields, not None"),
    ("dit", [1], "dit is a group of fields"),
    ("dit.x", 1, "dit.x is no field that is known"),
    ("width", 2**63, "width is a whole number from 1 to 16384, not 9223372036854775808"),
    ("width", 10**400, "not a number of 1329 bits"),
    ("height", -64, "height is a whole number"),
    ("fps", 0, "fps is a whole number from 1 to 1000"),
    ("name", 3, "name is text, not 3"),
    ("vae.std.2", 0, "vae.std is a list of"),
    ("vae.mean", [0.5], "vae.mean has 16 numbers"),
    ("vae.strides", [[2, 1]], "vae.multipliers are one more than the 1 strides"),
    ("vae.kernel", [2, 2], "vae.kernel has odd sizes"),
    ("vae.attention", 1, "vae.attention is true or false, not 1"),
    ("text.heads", 3, "text.attn_dim is a multiple of 3"),
    ("stream.window", 2**40, "stream.window is a whole number"),
    ("stream.window", 1, "stream makes no sense: a window of 1 has no room"),
    ("stream.kv", ["int8"], "stream.kv is text"),
    ("stream.recache", {"form": "x"}, "stream.recache makes no sense: form 'x': choose"),
    ("sampler.timesteps", [1.5], "sampler.timesteps is a list of"),
    ("sampler.shift", 0, "sampler.shift is a number above 0"),
    ("decoders", [], "decoders are a group"),
    ("decoders", {"a": {"kind": "x"}}, "decoders.a.kind is one of wan, tae"),
    ("decoders", {"a": 3}, "decoders.a.kind is one of wan, tae"),
    ("precision", {"layers": [["a"]]}, r"precision.layers\[0\] is a list of 2 \(text\)"),
    ("precision", {"layers": [["a", "x"]]}, "precision makes no sense: a in 'x'"),
]


@pytest.mark.parametrize(("path", "value", "said"), WRONG)
def test_a_wrong_field_is_named(tmp_path, path, value, said):
    data = changed(plain(TINY), path, value)
    with pytest.raises(InputError, match=said) as caught:
        config.from_json(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    text = json.dumps(data) if value != 10**400 else json.dumps(changed(data, path, 0))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json"):
        model.read_config(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("text.dim", 64, "text.dim is 64 and dit.text_dim 128, which must be the same"),
        ("vae.latent_channels", 8, "vae"),
        ("height", 8, "height and width are at least 16 x 16"),
        ("sampler.solver", "ddim", "choose one of dpmpp"),
        ("sampler.steps", 0, "at least 1 step"),
        ("stream.attention", "none", "is no model's config"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, path, value, said):
    shipped = model.folder_of("tiny")
    for file in shipped.iterdir():
        os.symlink(file, tmp_path / file.name)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(changed(plain(TINY), path, value)))
    with pytest.raises(InputError, match=said):
        longlive_jax.load(tmp_path)


def test_what_no_memory_holds_is_refused():
    large = dataclasses.replace(
        WAN21_T2V_14B, stream=StreamConfig(chunk=3, window=60000, sink=3), height=8192, width=8192
    )
    with pytest.raises(InputError, match="stream.window holds .* keys and values"):
        config.check_whole(large)


def test_a_missing_field_is_named():
    data = plain(TINY)
    del data["dit"]["dim"]
    with pytest.raises(InputError, match="dit has no dim"):
        config.from_json(data)
    with pytest.raises(InputError, match="it has no dit"):
        config.from_json({"name": "x"})


def test_values_are_checked_however_they_are_made(tiny):
    with pytest.raises(InputError, match="sink is a whole number from 0 to 1048576, not -1"):
        StreamConfig(chunk=3, window=12, sink=-1)
    with pytest.raises(InputError, match="time_scale is a number"):
        tiny.streaming(time_scale=math.inf)
    assert fields.make(StreamConfig, {"chunk": 3, "window": 12, "sink": 3, "time_scale": 1})


SESSION = [
    ("seed", 2**70, "seed is a whole number"),
    ("seed", "1", "seed is a whole number"),
    ("dtype", "float8", "dtype is one of"),
    ("dtype", 3, "dtype is text"),
    ("fingerprint", None, "fingerprint is text"),
    ("history", -1, "history is a whole number"),
    ("notes", "abc", "notes is a list"),
    ("notes", [1], "notes is a list"),
    ("position.chunk", -1, "position.chunk is a count|position.latents are"),
    ("position.chunk", 2**40, "position"),
    ("position.latents", 7, "position.latents are 3 for each of its 1 chunks"),
    ("position.changes", [{"kind": 1}], r"position.changes\[0\]"),
    ("position.prompt", {}, "position.prompt is text"),
    ("solver.steps", [], "solver.steps are 1 to 1000, not 0"),
    ("solver.steps.0.sigma", 1e300, "solver.steps"),
    ("solver.steps.0.sigma", "x", r"solver.steps\[0\].sigma is a number"),
    ("solver.steps.0.correct", [1.0], "solver.steps have 5 numbers"),
    ("solver.steps.0.predict.0", 1e9, "solver.steps have coefficients"),
    ("last.frame", -3, "last.frame is a count"),
    ("ahead", [{"chunk": 0}] * 2, "ahead|position"),
    ("ahead", 3, "ahead is a list"),
    ("model", "tiny", "model is a group of fields"),
    ("model.precision", {"layers": 3}, "model.precision.layers"),
    ("stream.sink", -1, "stream.sink is a whole number"),
    ("stream.recache", None, "stream.recache is a group"),
]


@pytest.mark.parametrize(("path", "value", "said"), SESSION)
def test_a_wrong_fact_of_a_session_is_named(tiny, folder, tmp_path, path, value, said):
    facts = json.loads((folder / saved.FACTS).read_text())
    (tmp_path / saved.FACTS).write_text(json.dumps(changed(facts, path, value)))
    with pytest.raises(InputError, match=f"is broken: session.json: .*({said})") as caught:
        longlive_jax.restore(tmp_path, model=tiny)
    assert "\n" not in str(caught.value)


def test_arrays_of_a_session_are_held_against_its_model(tiny, folder, tmp_path, monkeypatch):
    copy_ = shutil.copytree(folder, tmp_path / "session")
    read = saved._read

    def with_array(name, value):
        monkeypatch.setattr(saved, "_read", lambda *given: read(*given) | {name: value})

    for name, value, said in (
        ("rest", np.zeros((1, 9, 9, 3), np.uint8), "its rest is of another shape"),
        ("rest", np.zeros((1, 64, 64, 3), np.float32), "its rest is of another shape"),
        ("rest", {}, "its rest is of another shape"),
        ("given", np.zeros((1, 1), np.float32), "its given is of another shape"),
        ("carry", {"x": np.full(3, np.nan, np.float32)}, "its carry holds NaN or infinity"),
    ):
        with_array(name, value)
        with pytest.raises(InputError, match=said):
            longlive_jax.restore(copy_, model=tiny)
    monkeypatch.setattr(saved, "_read", read)
    monkeypatch.setattr(saved.saved_check, "most_bytes", lambda *given: 1000)
    with pytest.raises(InputError, match="its arrays claim .* more than 1000"):
        longlive_jax.restore(copy_, model=tiny)


@pytest.mark.parametrize("number", [2**31, 2**40, -1])
def test_a_token_beyond_the_vocabulary_is_refused(tiny, number):
    odd = PieceTokenizer(lambda prompt: [number], eos=1, pad=0, text_len=40)
    encoder = dataclasses.replace(tiny.text, tokenizer=odd)
    with pytest.raises(InputError, match=f"token {number} is outside"):
        encoder(["a red circle"])
