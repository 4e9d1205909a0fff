"""Drift of long videos: what the measure sees and what it does not."""

import json

import fake
import numpy as np
import pytest

from longlive_jax import cli
from longlive_jax.data.toy_world import chunk_start, render
from longlive_jax.eval import drift, run, toy_suite

CHUNKS = 27  # 20.1 s
SIZES = dict(videos=4, seconds=20.0)


@pytest.fixture(scope="module")
def scripts():
    return toy_suite.build(prompts=0, per_unseen=0, minutes=4).minutes


@pytest.fixture(scope="module")
def truth(scripts):
    return [render(script, chunk_start(CHUNKS)) for script in scripts]


def test_what_moves_does_not_drift(scripts, truth):
    found = drift.score(scripts, truth)
    assert found["drift"]["value"] < 0.5
    assert found["right_at_start"]["value"] == found["right_at_end"]["value"] == 1.0
    assert list(found["drift_at"]) == ["10.0", str(chunk_start(CHUNKS) / 16)]


def test_a_distance_counts_levels_wherever_they_are():
    frames = np.random.default_rng(0).integers(0, 200, (4, 8, 8, 3), np.uint8)
    assert drift.distance(frames, frames[::-1, ::-1]) == 0
    assert drift.distance(frames, frames + 7) == 7


def test_fading_grows_and_the_judge_need_not_see_it(scripts, truth):
    def faded(video):
        level = np.linspace(1.0, 0.8, len(video))[:, None, None, None]
        return np.round(video * level).astype(np.uint8)

    found = drift.score(scripts, [faded(video) for video in truth])
    middle, end = found["drift_at"].values()
    assert drift.score(scripts, truth)["drift"]["value"] + 3 < middle < end
    assert end == pytest.approx(found["drift"]["value"])


def test_a_model_is_scored_beside_the_truth(scripts, truth):
    asked = []

    def generate(jobs):
        asked.extend(jobs)
        return truth

    found = drift.evaluate(generate, **SIZES, reconstruct=lambda videos: videos)
    assert [job.chunks for job in asked] == [CHUNKS] * 4
    both = (found["baselines"][name] for name in ("ground_truth", "reconstruction"))
    assert all({**one, "seconds": 20.0, "baselines": found["baselines"]} == found for one in both)


def test_the_command_says_what_it_was_run_with(capsys, monkeypatch):
    given = {}
    monkeypatch.setattr(run, "drift", lambda model, **asked: given.update(asked) or {"drift": 0})
    arguments = ["eval", "--suite", "drift", "--seconds", "120"]
    assert cli.run(arguments, load=lambda name: fake.Model()) == 0
    assert json.loads(capsys.readouterr().out) == {"drift": 0}
    assert given == {"seconds": 120.0, "steps": None, "seed": 0}
