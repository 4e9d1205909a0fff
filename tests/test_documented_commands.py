"""Every command of the documents is run, as written but for what `documented.py` shortens."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import documented
import jax
import pytest
import small_wan
import training
from documented import DOCUMENTS, GROUPS, INSTALLS, NAMES, ROOT, TESTS

import longlive_jax
from longlive_jax import bench_model, bench_session, bench_train, cli, config, lora, model, plan
from longlive_jax.config import SHIPPED, TINY
from longlive_jax.eval import run as suites

LIMIT = 1800  # seconds after which a command is taken to hang
SIDE = 64  # pixels of a picture
ALL = sorted(set(itertools.chain.from_iterable(map(documented.commands, DOCUMENTS))))
TABLE = [command for group in GROUPS.values() for command in group.commands]


def test_every_command_is_known():
    """What a document adds has to be added to `documented.py`, what it drops be dropped."""
    rules = (INSTALLS, TESTS, NAMES)
    unknown = [x for x in ALL if x not in TABLE and not any(rule.match(x) for rule in rules)]
    assert not unknown, f"commands that no test runs: {unknown}"
    gone = sorted(set(TABLE) - set(ALL))
    assert not gone, f"commands that no document has any more: {gone}"


def test_what_is_installed_is_there():
    """CI installs from nothing; here, the extras that documents name exist."""
    extras = set(importlib.metadata.metadata("longlive-jax").get_all("Provides-Extra"))
    named = re.findall(r"pip install[^&]*'\.\[(.*?)\]'", "\n".join(ALL))
    assert named and {x for names in named for x in names.split(",")} <= extras


def test_what_tests_are_run_is_there(pytestconfig):
    """CI runs them; here, files and marks that documents name exist."""
    marks = {line.split(":")[0] for line in pytestconfig.getini("markers")}
    for command in filter(TESTS.match, ALL):
        words = shlex.split(command)
        for word in words:
            if word.startswith("tests/") or word.startswith("."):
                file, _, test = word.partition("::")
                assert (ROOT / file).exists(), command
                assert not test or f"def {test}(" in (ROOT / file).read_text("utf-8"), command
        if "-m" in words[3:]:
            assert set(words[words.index("-m", 3) + 1].split()) - {"not"} <= marks, command


def test_flags_that_are_added_take_the_place_of_others():
    """A flag of one value is refused where it is there twice."""
    command = "A=1 longlive bench --suite train --seconds=9 --from a --from 'b c' --seconds=8 --ema"
    assert documented.filled(command, "--seconds 1 --repeat 2 --from d") == [
        *("A=1", "longlive", "bench", "--suite", "train", "--ema"),
        *("--seconds", "1", "--repeat", "2", "--from", "d"),
    ]


@pytest.mark.parametrize("command", [x for x in ALL if NAMES.match(x)])
def test_what_is_named_in_prose_has_help(command, capsys):
    assert cli.run([*shlex.split(command)[1:2], "--help"]) == 0
    assert "--" in capsys.readouterr().out


def _marked(name):
    marks = [getattr(pytest.mark, mark) for mark in GROUPS[name].marks]
    return pytest.param(name, marks=[pytest.mark.slow, *marks], id=name.replace(" ", "_"))


@pytest.mark.parametrize("name", [_marked(name) for name in GROUPS])
def test_commands_run(name, tmp_path, monkeypatch, capsys):
    group = GROUPS[name]
    for package in group.needs:
        pytest.importorskip(package, reason=f"stand-ins of published files need {package}")
    if "aot" in group.marks:
        pytest.importorskip("jax_cuda13_plugin", reason="needs the [aot] extra")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "experiments", "experiments", ignore=lambda *_: ["__pycache__", "runs"])
    for folder in ("longlive_jax", "kernels", "tests"):
        pathlib.Path(folder).symlink_to(ROOT / folder)
    for stand_in in group.stand_ins:
        _make(stand_in, monkeypatch)
    for command, more in group.commands.items():
        _run(documented.filled(command, more), capsys)


@pytest.mark.slow
def test_snippets_run_as_pasted(tmp_path, monkeypatch, capsys):
    """Python of the README, one block after the other, and the story that it shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(longlive_jax, "load", _load)
    blocks = documented.BLOCK.findall((ROOT / "README.md").read_text("utf-8"))
    names, made = {}, []
    for block in (text for language, text in blocks if language == "python"):
        exec(block, names)
        made.append(len(names["frames"]))
    assert made[0] >= 160 and min(made) > 0  # ten seconds, and a chunk of a batch
    (told,) = (text for language, text in blocks if language == "json")
    pathlib.Path("story.json").write_text(told, "utf-8")
    _run(["longlive", "generate", "--script", "story.json"], capsys)


def _run(words: list[str], capsys) -> None:
    """Runs a command: ours in this process unless it wants other devices, others in theirs."""
    command = shlex.join(words)
    if words[0] == "longlive" and "--cpu_devices" in words:
        words[:1] = ["python", "-m", "longlive_jax"]
    if words[0] == "longlive":
        code = cli.run(words[1:], load=_load)
        assert code == 0, f"{command}\n{capsys.readouterr().err}"
        return
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    environment.pop("PJRT_NPROC", None)  # of this process, which has other devices
    while "=" in words[0]:
        environment.update([words.pop(0).split("=", 1)])
    script = words[1:] if words[0] == "python" else [f"experiments/{words[0]}", *words[1:]]
    done = subprocess.run(
        [sys.executable, *script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"


@functools.cache
def _tiny(**choices):
    return model.load("tiny", **choices)


def _load(name, **choices):
    """Programs of the model that ships are compiled once for all commands, and what stands for
    large models makes small pictures.
    """
    if name == "tiny" and not any(choices.values()):
        return _tiny()
    loaded = model.load(name, **choices)
    size = dict(height=min(loaded.config.height, SIDE), width=min(loaded.config.width, SIDE))
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, **size))


def _make(name: str, monkeypatch) -> None:
    """Something small under the name of what cannot be had here."""
    path = pathlib.Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if name in plan.PRESETS:
        _preset(name, monkeypatch)
    elif name == "few videos":
        small = dict(
            toy=dict(prompts=2, per_unseen=1, minutes=1), switch=dict(count=2), drift=dict(videos=2)
        )
        for suite, sizes in small.items():
            monkeypatch.setattr(suites, suite, functools.partial(getattr(suites, suite), **sizes))
    elif name == "little effort":
        effort = functools.partial(bench_session.Effort, trials=1, sizes=(1, 2), rounds=1)
        monkeypatch.setattr(bench_session, "Effort", effort)
        monkeypatch.setattr(bench_train, "run", functools.partial(bench_train.run, ranks=(1, 2)))
        monkeypatch.setattr(bench_train, "LENGTH", 12)
    elif name.endswith("_model"):
        path.symlink_to(SHIPPED / "tiny")
    elif name.endswith("lora.safetensors"):
        _lora(path)
    else:
        PUBLISHED[name](path)


def _preset(name, monkeypatch):
    """The tiny model with narrow VAEs of a large one: its own, and the faster decoders."""
    large = plan.PRESETS[name]
    vae = dataclasses.replace(large.vae, encoder_dim=4, decoder_dim=8)
    dit = dataclasses.replace(TINY.dit, channels=large.dit.channels)
    small = dataclasses.replace(TINY, name=name, dit=dit, vae=vae)
    monkeypatch.setitem(plan.PRESETS, name, small)
    if large.vae == config.WAN22_VAE:
        monkeypatch.setattr(config, "WAN22_VAE", vae)
    narrow = dict(encoder_dim=4, decoder_dims=(8, 6, 4, 4))
    taes = [dataclasses.replace(tae, **narrow) for tae in bench_model.TAES]
    monkeypatch.setattr(bench_model, "TAES", taes)


def _lora(path):
    """An adapter of the tiny model that changes nothing."""
    adapter = lora.init(_tiny().dit, 4, jax.random.key(0))
    lora.save(path, adapter)


def _wan21(path):
    import torch

    small_wan.write(path)
    for name, file in {"vae": "Wan2.1_VAE.pth", "text": "models_t5_umt5-xxl-enc-bf16.pth"}.items():
        tensors = small_wan.tensors(name)
        torch.save({k: torch.from_numpy(x) for k, x in tensors.items()}, path / file)


def _generator(path):
    import torch

    tensors = small_wan.tensors("dit", seed=1)
    torch.save({"generator": {f"model.{k}": torch.from_numpy(x) for k, x in tensors.items()}}, path)


def _published_lora(path):
    import torch

    place = "base_model.model.blocks.{}.self_attn.q.lora_{}.weight"
    shapes = {"A": (4, small_wan.DIT.dim), "B": (small_wan.DIT.dim, 4)}
    halves = itertools.product(range(small_wan.DIT.layers), "AB")
    torch.save({place.format(*half): torch.ones(shapes[half[1]]) for half in halves}, path)


def _packed(path):
    """LongLive 2.0's transformer in NVFP4, of the model that is converted with it."""
    import test_convert

    test_convert.packed_file(pathlib.Path("Wan2.2-TI2V-5B"), path)


PUBLISHED = {
    "Wan2.1-T2V-1.3B": _wan21,
    "longlive_base.pt": _generator,
    "lora.pt": _published_lora,
    "Wan2.2-TI2V-5B": training.write_model,
    "model_4o6.pt": _packed,
}
