"""The suite of switches: its measures on rendered videos and on videos with known answers."""

import dataclasses
import json

import fake
import numpy as np
import pytest

import longlive_jax
from longlive_jax import cli
from longlive_jax.data import toy_world as world
from longlive_jax.data.caption import ATTRIBUTES, parse
from longlive_jax.eval import run, switching
from longlive_jax.eval.generate import generator
from longlive_jax.eval.switching import AFTER, BEFORE, CHANGE, SOON, WINDOW
from longlive_jax.eval.toy_suite import Job
from longlive_jax.events import CUT_PREFIX

FRAMES = BEFORE + AFTER
GAP = 10  # frames that a switch is late


@pytest.fixture(scope="module")
def cases():
    return switching.build(16, 0)


def clip_of(case, *segments):
    return world.render(world.Script((case.start, *segments)), FRAMES, CHANGE - BEFORE)


def moves(case):
    return case.start.scene.value("motion") != "stays still"


def late(case, frames):
    """A video whose switch comes that many frames too late."""
    scene = case.switch.scene
    return clip_of(case, world.switch(case.start, scene, "", CHANGE + frames))


def test_cases_are_even_and_depend_on_the_seed_only(cases):
    assert [case.attribute for case in cases] == list(ATTRIBUTES) * 4
    assert cases == switching.build(16, 0) != switching.build(16, 1)
    assert len({case.seed for case in (*cases, *switching.build(16, 1))}) == 32
    for case in cases:
        old, new = case.start.scene, case.switch.scene
        assert [a for a in ATTRIBUTES if old.value(a) != new.value(a)] == [case.attribute]
        for segment in (case.start, case.switch, case.cut):
            (thing,) = segment.scene.things
            assert (thing.colour, thing.shape) in world.SEEN_PAIRS
            assert parse(segment.caption) == segment.scene
        assert case.switch.start == case.cut.start == CHANGE == 189
        assert case.cut.caption.startswith(CUT_PREFIX)


def test_rendered_truth_shows_as_soon_as_can_be_seen(cases):
    for case in cases:
        clip = switching.truth(case)["switch"]
        assert clip.shape == (FRAMES, 64, 64, 3)
        seen = switching.see_switch(case, clip)
        assert seen.shown == WINDOW[case.attribute]
        assert seen.held and all(seen.others.values()) and len(seen.others) == 3


def test_a_late_switch_is_seen_when_it_comes(cases):
    """A window reads the new value once most of its frames show it."""
    for case in cases:
        seen, width = switching.see_switch(case, late(case, GAP)), WINDOW[case.attribute]
        assert GAP + width // 2 <= seen.shown <= GAP + width
        assert seen.held and all(seen.others.values())


def test_a_late_switch_is_no_jump_across_the_boundary_but_one_after_it(cases):
    backgrounds = [case for case in cases if case.attribute == "background" and moves(case)]
    assert backgrounds
    for case in backgrounds:
        on_time = switching.see_switch(case, switching.truth(case)["switch"]).jumps
        too_late = switching.see_switch(case, late(case, GAP)).jumps
        assert on_time[0] > 5 > 2 > on_time[1]
        assert too_late[1] > 5 > 2 > too_late[0]


def test_a_switch_that_never_comes_is_not_seen(cases):
    for case in cases:
        seen = switching.see_switch(case, clip_of(case))
        assert not seen.held and all(seen.others.values())
        assert seen.shown is None


def test_the_jump_is_in_units_of_what_moves_anyway():
    """Every frame 1 level from the next; 7 across the change, and a flicker of 30 afterwards."""
    level = 100 + np.arange(FRAMES) % 2
    level[BEFORE:] = level[BEFORE - 1] + 7
    level[BEFORE + 5] += 30
    clip = np.broadcast_to(level[:, None, None, None], (FRAMES, 64, 64, 3)).astype(np.uint8)
    assert switching.jumps(clip) == (7.0, 30.0)
    clip = clip.copy()
    clip[BEFORE + SOON + 1] += 90  # later than a second after
    assert switching.jumps(clip) == (7.0, 30.0)


def test_a_flicker_is_a_jump_and_nothing_else(cases):
    case = next(c for c in cases if c.attribute == "colour" and moves(c))
    clip = switching.truth(case)["switch"]
    steady = switching.see_switch(case, clip)
    clip[BEFORE + 10] = 255 - clip[BEFORE + 10]
    seen = switching.see_switch(case, clip)
    assert seen.jumps[0] == steady.jumps[0] and seen.jumps[1] > 10 * steady.jumps[1]
    assert dataclasses.replace(seen, jumps=steady.jumps) == steady


def test_a_frozen_video_shows_nothing_and_does_not_jump(cases):
    for case in (c for c in cases if c.switch.scene.value("motion") != "stays still"):
        clip = switching.truth(case)["switch"]
        clip[BEFORE:] = clip[BEFORE - 1]
        seen = switching.see_switch(case, clip)
        assert (seen.shown, seen.held) == (None, False)
        assert seen.jumps == ((0.0, 0.0) if moves(case) else None)
        assert seen.others == {a: a != "motion" for a in seen.others}


def test_what_stood_still_has_no_jumps(cases):
    still = [case for case in cases if not moves(case)]
    assert still
    for case in still:
        clip = switching.truth(case)["switch"]
        assert switching.jumps(clip) is None  # rendered: not a level
        clip[:, 0, 0, 0] = np.arange(FRAMES) % 2  # made: a little
        assert switching.see_switch(case, clip).jumps is None


def test_a_video_without_an_object_is_wrong_everywhere(cases):
    blank = np.zeros((FRAMES, 64, 64, 3), np.uint8)
    seen = switching.see_switch(cases[0], blank)
    assert (seen.shown, seen.held, any(seen.others.values())) == (None, False, False)
    cut = switching.see_cut(cases[0], blank)
    assert not any(cut.held.values()) and not any(cut.shown.values())


def test_a_cut_is_read_attribute_by_attribute(cases):
    for case in cases:
        seen = switching.see_cut(case, switching.truth(case)["cut"])
        assert seen == switching.Cut(WINDOW, dict.fromkeys(ATTRIBUTES, True))
    for case in cases[:3]:
        deaf = switching.see_cut(case, clip_of(case))
        old, new = case.start.scene, case.cut.scene
        assert deaf.held == {a: old.value(a) == new.value(a) for a in ATTRIBUTES}


def test_scores_are_what_counting_by_hand_gives():
    def seen(attribute, shown, others=True, jumped=None):
        rest = {a: others for a in ATTRIBUTES if a != attribute}
        return switching.Switched(attribute, shown, shown is not None, rest, jumped)

    scores = switching.score_switches(
        [
            seen("colour", 4, jumped=(1.0, 3.0)),
            seen("colour", 17, jumped=(3.0, 5.0)),
            seen("shape", 48, others=False),
            seen("motion", None),
        ]
    )
    assert scores["frames_until_shown"] == (17 + 48) / 2
    assert [scores[name]["value"] for name in ("shown_1s", "shown_3s", "held", "others")] == [
        *(0.25, 0.75, 0.75, 0.75)
    ]
    assert scores["jump"] == {"median": 2.0, "p90": pytest.approx(2.8), "n": 2}
    assert scores["largest_jump"]["median"] == 4.0
    assert scores["others_by_attribute"]["colour"]["value"] == 0.5
    assert scores["others_by_attribute"]["shape"]["n"] == 3
    assert scores["by_attribute"]["motion"]["frames_until_shown"] is None
    assert scores["by_attribute"]["motion"]["jump"] == {"median": None, "p90": None, "n": 0}
    assert scores["by_attribute"]["colour"]["shown_1s"]["value"] == 0.5
    assert "background" not in scores["by_attribute"]


def test_a_perfect_model_scores_one():
    def play(cases):
        for case in cases:
            clips = switching.truth(case)
            yield case, {"keep": clips["switch"], "prefix once": clips["cut"]}

    scores = switching.evaluate(play, count=8, reconstruct=lambda videos: videos)
    assert list(scores) == ["switches", "cuts", "baselines"]
    switch, cut = scores["switches"]["keep"], scores["cuts"]["prefix once"]
    assert switch["shown_1s"] == switch["held"] == switch["others"] == cut["right_1s"]
    assert (cut["right_1s"]["value"], cut["right_1s"]["n"]) == (1.0, 8)
    same = {"switches": {"switch": switch}, "cuts": {"cut": cut}}
    assert scores["baselines"] == {"ground_truth": same, "reconstruction": same}
    json.dumps(scores, allow_nan=False)


# ---- the player


@pytest.fixture(scope="module")
def tiny():
    return longlive_jax.load("tiny")


def test_clips_are_those_of_whole_videos_and_share_their_beginning(tiny, monkeypatch):
    """The default recache, and a cut, are what videos made from start to end show."""
    names = ("recache causal first", "keep", "prefix kept", "prefix once")
    branches = {name: switching.BRANCHES[name] for name in names}
    monkeypatch.setattr(switching, "BRANCHES", branches)
    (case,) = switching.build(1, 0)
    ((found, clips),) = switching.player(tiny, steps=1, batch=1)([case])
    assert found == case and tuple(clips) == names
    for clip in clips.values():
        assert clip.shape == (FRAMES, 64, 64, 3) and clip.dtype == np.uint8
        np.testing.assert_array_equal(clip[:BEFORE], clips["keep"][:BEFORE])
    after = {name: clip[BEFORE:].tobytes() for name, clip in clips.items()}
    assert len(set(after.values())) == len(names)

    def whole(segment):
        events = ((0, "start", case.start.caption), (switching.LEAD, segment.kind, segment.caption))
        job = Job(events, switching.LEAD + switching.TAIL, case.seed)
        (video,) = generator(tiny, steps=1, batch=1)([job])
        return video[-FRAMES:]

    np.testing.assert_array_equal(clips["recache causal first"], whole(case.switch))
    np.testing.assert_array_equal(clips["prefix kept"], whole(case.cut))
    session = tiny.session(case.start.caption, seed=case.seed, steps=1)
    chunks = [session.next_chunk() for _ in range(switching.LEAD)]
    session.cut(case.cut.caption)
    chunks += [session.next_chunk() for _ in range(switching.TAIL)]
    np.testing.assert_array_equal(clips["prefix once"], np.concatenate(chunks)[-FRAMES:])


def test_the_suite_says_what_it_was_run_with(tiny, monkeypatch):
    def play(cases):
        return ((case, {"keep": switching.truth(case)["switch"]}) for case in cases)

    monkeypatch.setattr(switching, "player", lambda model, steps: play)
    monkeypatch.setattr(run, "reconstructor", lambda config, vae: lambda videos: videos)
    scores = run.switch(tiny, steps=None, seed=3, count=4)
    assert [scores[name] for name in ("suite", "model", "steps", "seed")] == [
        "switch",
        "tiny",
        4,
        3,
    ]
    assert scores["switches"]["keep"]["shown_1s"]["n"] == 4


def test_the_command_chooses_the_suite(capsys, monkeypatch):
    given = {}

    def switch(model, steps, seed):
        given.update(model=model, steps=steps, seed=seed)
        return {"suite": "switch"}

    monkeypatch.setattr(run, "switch", switch)
    model = fake.Model()
    arguments = ["eval", "--suite", "switch", "--steps", "2", "--seed", "5"]
    assert cli.run(arguments, load=lambda name: model) == 0
    assert json.loads(capsys.readouterr().out) == {"suite": "switch"}
    assert given == {"model": model, "steps": 2, "seed": 5}
