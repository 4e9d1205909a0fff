"""Two ways of running a model side by side: what is counted, of the truth and of what is wrong."""

import dataclasses

import numpy as np
import pytest

from longlive_jax.data.toy_world import chunk_start, render
from longlive_jax.eval import fidelity, toy_suite
from longlive_jax.eval.fidelity import Sizes

SIZES = Sizes(prompts=4, long=2, seconds=65.0, switching=1)


def truth(sizes, seed):
    """What a generator that is always right makes."""
    most = max(sizes.long, sizes.switching)
    suite = toy_suite.build(prompts=sizes.prompts, per_unseen=0, minutes=most, seed=seed)
    groups = iter((suite.prompts, suite.minutes, suite.switching))

    def generate(jobs):
        made = zip(next(groups), jobs, strict=False)
        return [render(script, chunk_start(job.chunks)) for script, job in made]

    return fidelity.make(generate, sizes, seed)


@pytest.fixture(scope="module")
def made():
    return truth(SIZES, 0)


def test_the_truth_is_right(made):
    found = fidelity.score(made, made.short.videos)
    ones = ("colour", "shape", "motion", "adherence", "right_at_end", "switch_1s")
    assert {name: found[name] for name in ones} == dict.fromkeys(ones, 1.0)
    assert found["psnr"] == 99.0
    assert 0 <= found["drift"] < 0.5 and 0 <= found["drift_60s"] < 0.5


def test_what_is_wrong_is_counted(made):
    """Prompts that get each other's videos; pictures that are a level off."""
    others = dataclasses.replace(made.short, videos=made.short.videos[::-1])
    others = dataclasses.replace(made, short=others)
    off = [np.where(video > 127, video - 1, video + 1) for video in others.short.videos]
    found = fidelity.score(others, off)
    assert found["adherence"] < 0.5
    assert found["psnr"] == pytest.approx(20 * np.log10(255), abs=0.01)


def test_only_what_was_made_is_scored():
    sizes = Sizes(prompts=2, long=0)
    found = fidelity.score(truth(sizes, 1))
    assert set(found) == {"colour", "shape", "motion", "adherence"}
