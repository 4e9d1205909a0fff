"""Training runs of the tests: a small model in a folder, a small data set, a config of both."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streams

import longlive_jax
from longlive_jax import model as models
from longlive_jax import weights
from longlive_jax.config import DiTConfig, ModelConfig, SamplerConfig, StreamConfig, TextConfig
from longlive_jax.dit.model import DiT
from longlive_jax.text import tiny
from longlive_jax.text.umt5 import UMT5
from longlive_jax.train import trainer
from longlive_jax.train.ar import ARConfig
from longlive_jax.train.recycling import RecyclingConfig
from longlive_jax.train.source import SourceConfig
from longlive_jax.train.state import OptimizerConfig
from longlive_jax.train.step import Program
from longlive_jax.vae.vae import VAE

CHUNKS = 4  # of a sequence, each of one latent frame: 13 frames of video
SMALL = ModelConfig(
    name="small",
    dit=DiTConfig(
        dim=32, ffn_dim=48, heads=8, layers=1, channels=4, text_dim=16, text_len=40, freq_dim=16
    ),
    vae=dataclasses.replace(streams.SMALL_VAE, patch=8),
    text=TextConfig(vocab=128, dim=16, attn_dim=16, ffn_dim=16, heads=2, layers=1),
    stream=StreamConfig(chunk=1, window=3, sink=1),
    sampler=SamplerConfig(solver="euler", steps=1, shift=3.0),
    height=32,
    width=32,
    fps=16,
)
# Small buffers, so that entries are replaced too.
RECYCLING = dict(buckets=4, size=2, positions=2, clean_prob=0.3, warmup=1, noise_inject=0.5)
TIMES = {"step_s", "tokens_s"}  # differ from run to run


def write_model(folder: pathlib.Path, cfg: ModelConfig = SMALL) -> pathlib.Path:
    """The small model, or another one, with random weights."""
    build = {
        "dit": lambda rngs: DiT(cfg.dit, rngs=rngs),
        "text": lambda rngs: UMT5(cfg.text, rngs=rngs),
        "vae": lambda rngs: VAE(cfg.vae, rngs=rngs),
    }
    flat = {part: weights.flatten(streams.randomly(make)) for part, make in build.items()}
    models.save(folder, cfg, flat, jnp.float32)
    tiny.write(folder / "tokenizer.json")
    return folder


def fields(model: pathlib.Path, videos: pathlib.Path, /, **changes) -> dict:
    """A config file's values. Changes of a part are given as part__field."""
    made = dict(
        model=str(model),
        source=dict(folder=str(videos), chunks=CHUNKS, batch=2),
        ar=dict(context_sigma=0.2, context_share=0.7, windowed=True),
        optimizer=dict(learning_rate=1e-2, steps=4, warmup=1, b1=0.5, ema=0.9),
        seed=3,
        log_every=1,
        save_every=2,
    )
    for name, value in changes.items():
        *part, field = name.split("__")
        (made[part[0]] if part else made)[field] = value
    return made


def config(given: dict) -> trainer.TrainConfig:
    recycling = given.get("recycling")
    parts = dict(
        source=SourceConfig(**given["source"]),
        ar=ARConfig(**dict(stream=SMALL.stream) | given["ar"]),
        optimizer=OptimizerConfig(**given["optimizer"]),
        recycling=None if recycling is None else RecyclingConfig(**recycling),
    )
    return trainer.TrainConfig(**given | parts)


def begin(workdir: pathlib.Path, given: dict) -> trainer.Run:
    return trainer.Run(config(given), longlive_jax.load(given["model"]), workdir)


@contextlib.contextmanager
def programs():
    """Runs of the same model, config and mesh share one program, compiled in half the time."""
    inner = Program.compile

    @functools.cache
    def in_haste(program):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "jit", streams.jit)
            return inner(program)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "compile", in_haste)
        patch.setattr(longlive_jax, "load", functools.cache(longlive_jax.load))
        yield


def until(run: trainer.Run, step: int, monkeypatch) -> trainer.TrainState:
    """Trains, and tells the process to end in the middle of the step that comes to `step`."""
    inner = run._step

    def told(compiled, state, number):
        if number == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(compiled, state, number)

    monkeypatch.setattr(run, "_step", told)
    return run.train()


def lines(workdir: pathlib.Path) -> list[dict]:
    """The metrics, without what differs from run to run."""
    said = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in said]


def same(one, other, **tolerance):
    """The same leaves: bit for bit, or within a tolerance."""
    ours, theirs = (jax.tree_util.tree_leaves_with_path(tree) for tree in (one, other))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, x), (_, y) in zip(ours, theirs, strict=True):
        name = jax.tree_util.keystr(path)
        if tolerance:
            np.testing.assert_allclose(x, y, err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(x, y, err_msg=name)
