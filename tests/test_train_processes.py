"""Training and distillation as they are run: alone, told to end, and as two processes."""

import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import training
from safetensors.numpy import load_file
from training import RECYCLING, begin, fields, lines, same, until

from longlive_jax.data import toy_folder

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 300  # seconds after which a process is taken to hang
CONFIG = """
import json
import pathlib

import ml_collections


def get_config():
    file = pathlib.Path(__file__).with_name("fields.json")
    return ml_collections.ConfigDict(json.loads(file.read_text()))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """More steps than any test waits for."""
    model = training.write_model(tmp_path_factory.mktemp("model"))
    videos = tmp_path_factory.mktemp("videos") / "toy"
    toy_folder.write(videos, seed=1, samples=5, chunks=2)
    choices = dict(optimizer__steps=5000, recycling=RECYCLING, save_every=0)
    with training.programs():
        yield functools.partial(fields, model, videos, **choices)


def start(folder, made, *flags, experiment="train_ar", workdir="run"):
    """The experiment, as a process; what it says goes into a file."""
    (folder / "fields.json").write_text(json.dumps(made))
    (folder / "config.py").write_text(CONFIG)
    # One device, or as many as the flags say; compiled as `training.programs` does.
    environment = dict(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_backend_optimization_level=0")
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    command = [sys.executable, f"experiments/{experiment}.py", f"--config={folder / 'config.py'}"]
    with (folder / f"said{len(list(folder.glob('said*')))}").open("w") as said:
        return subprocess.Popen(
            [*command, f"--workdir={folder / workdir}", *flags],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=said,
            stderr=subprocess.STDOUT,
        )


def end(folder, processes, step):
    """Tells the last process to end when `step` is reported, and waits for all."""
    try:
        until_time, file = time.monotonic() + LIMIT, folder / "run" / "metrics.jsonl"
        while not file.exists() or f'"step": {step},' not in file.read_text():
            assert all(p.poll() is None for p in processes), said(folder)
            assert time.monotonic() < until_time, said(folder)
            time.sleep(0.05)
        processes[-1].send_signal(signal.SIGTERM)
        assert [p.wait(LIMIT) for p in processes] == [0] * len(processes), said(folder)
    finally:
        for p in processes:
            p.kill()
            p.wait()


def said(folder):
    return "\n".join(file.read_text() for file in sorted(folder.glob("said*")))


def test_a_run_that_was_told_to_end_goes_on_bit_for_bit(tmp_path, given):
    """At any step; what goes on is a new process."""
    made = given(optimizer__steps=40, save_every=1000)  # the last step is always saved
    end(tmp_path, [start(tmp_path, made)], 3)
    (stopped,) = (int(file.name) for file in (tmp_path / "run" / "checkpoints").iterdir())
    assert lines(tmp_path / "run")[-1]["step"] == stopped
    assert 3 <= stopped < 40 and f"told to end: saving step {stopped}" in said(tmp_path)
    runs = [start(tmp_path, made, workdir=name) for name in ("run", "whole")]
    assert [run.wait(LIMIT) for run in runs] == [0, 0], said(tmp_path)
    assert f"resumed at step {stopped}" in said(tmp_path)
    ours, theirs = (begin(tmp_path / name, made) for name in ("run", "whole"))
    same(*(run.train() for run in (ours, theirs)))  # nothing is left to do
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert len(lines(tmp_path / "run")) == 40
    same(ours.recycler.state(), theirs.recycler.state())
    assert ours.videos.get_state() == theirs.videos.get_state()


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_processes_are_one(tmp_path, given, monkeypatch):
    """They go on from a checkpoint of one device, which goes on from theirs. One of them is told
    to end, and both do. Each reads half of the videos, and has half of the weights.
    """
    made = given(source__batch=4, source__parts=2)
    until(begin(tmp_path / "run", made), 1, monkeypatch)
    flags = ["--processes=2", f"--coordinator=127.0.0.1:{port()}", "--cpu_devices=2"]
    both = made | dict(fsdp=2, seq=2)
    both = [start(tmp_path, both, *flags, f"--process={rank}") for rank in range(2)]
    end(tmp_path, both, 3)
    stopped = max(int(x.name) for x in (tmp_path / "run" / "checkpoints").iterdir())
    assert stopped >= 3
    resumed, whole = (begin(tmp_path / name, made) for name in ("run", "whole"))
    states = [until(run, stopped + 1, monkeypatch) for run in (resumed, whole)]
    same(*states, rtol=1e-3, atol=1e-3)
    ours, theirs = (lines(tmp_path / name) for name in ("run", "whole"))
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    assert resumed.videos.get_state() == whole.videos.get_state()


def distilled(model, prompts):
    """A sequence is of two clips and has a switch: a step of the student takes the first, one of
    the critic the second.
    """
    party = dict(rank=2, learning_rate=1e-2, steps=2, warmup=1, b1=0.5, ema=0.5)
    return dict(
        model=str(model),
        prompts=dict(file=str(prompts), batch=4, switch=[3, 3, 1], seed=1),
        clips=dict(first=3, next=2, length=5, newest=True),
        judge=dict(real_guidance=1.0),
        student=party,
        fake=party,
        precision={},
        steps=2,
        every=1,
        log_every=1,
        save_every=1,
        sample_every=2,
        sample_prompts=["a red circle"],
        sample_seconds=0.5,
    )


def test_distillation_of_two_processes_is_one(tmp_path, given):
    """Each has half of the videos, of the frozen weights and of what is learned; one writes."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps(["a red circle", "a blue square"]) + "\n")
    made = distilled(given()["model"], prompts)
    flags = ["--processes=2", f"--coordinator=127.0.0.1:{port()}", "--cpu_devices=2"]
    both = made | dict(data=2, fsdp=2)
    of = dict(experiment="distill_dmd")
    runs = [start(tmp_path, both, *flags, f"--process={rank}", **of) for rank in range(2)]
    assert [run.wait(LIMIT) for run in runs] == [0, 0], said(tmp_path)
    alone = start(tmp_path, made, workdir="alone", **of)
    assert alone.wait(LIMIT) == 0, said(tmp_path)
    for one, other in zip(lines(tmp_path / "run"), lines(tmp_path / "alone"), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    ours, theirs = (load_file(tmp_path / x / "lora.safetensors") for x in ("run", "alone"))
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        np.testing.assert_allclose(x, theirs[name], rtol=1e-3, atol=2e-4, err_msg=name)
    assert list((tmp_path / "run" / "samples").glob("*/*.mp4"))
