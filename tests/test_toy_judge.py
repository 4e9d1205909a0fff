"""The judge reads rendered videos (near) perfectly, wrong ones by chance, garbage never."""

import itertools

import numpy as np
import pytest

from longlive_jax.data import toy_world as world
from longlive_jax.data.caption import ATTRIBUTES, COLOURS, MOTIONS, SHAPES, VALUES, Scene, Thing
from longlive_jax.eval import toy_suite as suite
from longlive_jax.eval.toy import blob, read


def rough(video: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mild blur (sigma about 0.8 pixels) and noise."""
    soft = video.astype(np.float32)
    for axis in (1, 2):
        soft = 0.5 * soft + 0.25 * (np.roll(soft, 1, axis) + np.roll(soft, -1, axis))
    return np.clip(soft + rng.normal(0, 15, soft.shape), 0, 255).astype(np.uint8)


def windows(count: int, frames: int, seed: int):
    """Scenes (every colour, shape, motion and background, unseen pairs too) in mid-motion."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        scene = world.draw_scene(rng, unseen=True)
        script = world.Script((world.opening(rng, scene, ""),))
        yield scene, world.render(script, frames, int(rng.integers(0, 200)))


@pytest.mark.parametrize("frames", [12, 16, 32])
@pytest.mark.parametrize("look", ["rendered", "rough"])
def test_ground_truth(frames, look):
    rng = np.random.default_rng(0)
    hits = []
    for scene, video in windows(50, frames, frames):
        seen = read(video if look == "rendered" else rough(video, rng))
        hits.append(list(suite.agreement(seen, scene).values()))
    assert np.mean(hits, 0).min() >= 0.98, dict(zip(ATTRIBUTES, np.mean(hits, 0), strict=True))


def test_every_combination_of_colour_shape_and_background():
    rng = np.random.default_rng(1)
    for colour, shape, background in itertools.product(COLOURS, SHAPES, world.BACKGROUNDS):
        scene = Scene((Thing(colour, shape, "circles"),), background)
        script = world.Script((world.opening(rng, scene, ""),))
        assert read(world.render(script, 12, 5)) == scene


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_phase_of_every_motion(motion):
    scene = Scene((Thing("green", "triangle", motion),), "checkered")
    script = world.Script((world.opening(np.random.default_rng(2), scene, ""),))
    for start in range(32):
        assert read(world.render(script, 12, start)) == scene


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_each_attribute_is_read_by_itself(attribute):
    scene = Scene((Thing("yellow", "circle", "moves up"),), "grey")
    for value in VALUES[attribute]:
        shown = scene.change(attribute, value)
        script = world.Script((world.opening(np.random.default_rng(3), shown, ""),))
        agrees = suite.agreement(read(world.render(script, 16)), scene)
        assert agrees == {a: a != attribute or value == scene.value(a) for a in ATTRIBUTES}


def test_shuffled_captions_score_chance():
    pairs = [(scene, read(video)) for scene, video in windows(80, 12, 4)]
    others = ~np.eye(len(pairs), dtype=bool)
    for attribute in ATTRIBUTES:
        asked, seen = np.array([[s.value(attribute) for s in pair] for pair in pairs]).T
        hits = (asked[:, None] == seen[None, :])[others]
        np.testing.assert_allclose(hits.mean(), 1 / len(VALUES[attribute]), atol=0.04)


def gone(video):
    return np.broadcast_to(world.BACKDROPS["striped"], video.shape).copy()


def flooded(video):
    return np.full_like(video, 230)


def crumbs(video):
    dots = np.zeros_like(video)
    dots[:, ::9, ::9] = 255
    return dots


def noise(video):
    return np.random.default_rng(5).integers(0, 256, video.shape).astype(np.uint8)


def mostly_gone(video):
    return np.concatenate([video[:5], gone(video[5:])])


@pytest.mark.parametrize("spoil", [gone, flooded, crumbs, noise, mostly_gone])
def test_unreadable_is_wrong_everywhere(spoil):
    scene, video = next(windows(1, 16, 6))
    assert read(video) == scene
    assert read(spoil(video)) is None
    assert not any(suite.agreement(read(spoil(video)), scene).values())


def test_a_short_gap_is_forgiven():
    for scene, video in windows(20, 32, 7):
        video[10:13] = world.BACKDROPS[scene.background]
        assert read(video) == scene


def test_specks_do_not_distract():
    for scene, video in windows(20, 16, 8):
        free = blob(video.max(-1) > 127).sum(0) == 0
        y, x = np.argwhere(free[:-3, :-3])[0]
        video[:, y : y + 3, x : x + 3] = 255
        assert read(video).things == scene.things


def test_blob_wraps_round_and_takes_the_big_one():
    bright = np.zeros((2, 64, 64), bool)
    bright[0][np.ix_([62, 63, 0, 1, 2], [60, 61, 62, 63, 0, 1])] = True
    bright[0, 30:33, 30:33] = True
    wanted = bright.copy()
    wanted[0, 30:33, 30:33] = False
    np.testing.assert_array_equal(blob(bright), wanted)


# ---- the suite


def rendered(built: suite.Suite) -> suite.Generate:
    """A perfect model: it finds the script of a job by its events and its length."""
    groups = [(s, suite.SHORT) for s in built.prompts + built.unseen]
    groups += [(s, suite.MINUTE) for s in built.minutes + built.switching]
    scripts = {(s.events(), chunks): s for s, chunks in groups}

    def generate(jobs):
        for job in jobs:
            frames = world.chunk_start(job.chunks)
            yield world.render(scripts[job.events, job.chunks], frames)

    return generate


SMALL = {"prompts": 14, "per_unseen": 2, "minutes": 2}


@pytest.fixture(scope="module")
def perfect() -> dict:
    return suite.evaluate(rendered(suite.build(**SMALL)), **SMALL, reconstruct=lambda v: v)


FIELDS = ["colour", "shape", "motion", "background", "unseen_pairs", "switch_1s", "end_of_60s"]


def test_a_perfect_model_scores_one(perfect):
    counts = [14, 14, 14, 14, 4, 12, 2]
    assert [(perfect[f]["value"], perfect[f]["n"]) for f in FIELDS] == [(1.0, n) for n in counts]
    assert {m: r["n"] for m, r in perfect["motion_by_class"].items()} == dict.fromkeys(MOTIONS, 2)
    assert {a: r["n"] for a, r in perfect["switch_by_attribute"].items()} == dict.fromkeys(
        ATTRIBUTES, 3
    )
    own = {field: value for field, value in perfect.items() if field != "baselines"}
    assert perfect["baselines"]["ground_truth"] == own
    assert perfect["baselines"]["reconstruction"] == own


def test_the_shuffled_baseline_is_low(perfect):
    shuffled = perfect["baselines"]["shuffled"]
    assert all(shuffled[f]["value"] <= 0.6 for f in FIELDS)
    assert shuffled["colour"]["value"] < 0.4 and shuffled["motion"]["value"] < 0.4


def test_a_model_that_shows_nothing_scores_zero():
    def generate(jobs):
        return [np.zeros((world.chunk_start(j.chunks), 64, 64, 3), np.uint8) for j in jobs]

    built = suite.build(**SMALL)
    groups = [(getattr(built, g), c) for g, c in suite.LENGTHS.items()]
    blank = {g: generate(suite.jobs(s, c)) for g, (s, c) in zip(suite.LENGTHS, groups, strict=True)}
    scores = suite.score(built, suite.Videos(**blank))
    assert [scores[f]["value"] for f in FIELDS] == [0.0] * len(FIELDS)


def test_a_model_that_ignores_switches_fails_them():
    built = suite.build(**SMALL)
    deaf = tuple(world.Script(script.segments[:1]) for script in built.switching)
    truth = suite.ground_truth(built)
    videos = (world.render(script, world.chunk_start(suite.MINUTE)) for script in deaf)
    hits = suite.score(built, suite.Videos(truth.prompts, truth.unseen, truth.minutes, videos))
    assert hits["switch_1s"]["value"] <= 0.25  # a value may come back by later switches
    assert hits["end_of_60s"]["value"] == 1.0


def test_a_switch_must_show_within_a_second():
    """Two thirds of a second late is in time for appearance; two seconds late is not."""
    built = suite.build(prompts=0, per_unseen=0, minutes=2)

    def late(script, frames):
        segments = [
            s if s.kind == "start" else world.switch(s, s.scene, s.caption, s.start + frames)
            for s in script.segments
        ]
        return world.render(world.Script(tuple(segments)), world.chunk_start(suite.MINUTE))

    def by_attribute(frames):
        videos = [late(script, frames) for script in built.switching]
        truth = suite.ground_truth(built)
        group = suite.Videos(truth.prompts, truth.unseen, truth.minutes, videos)
        return suite.score(built, group)["switch_by_attribute"]

    assert all(by_attribute(10)[a]["value"] == 1.0 for a in ("colour", "shape", "background"))
    assert all(rate["value"] == 0.0 for rate in by_attribute(32).values())


@pytest.fixture(scope="module")
def built() -> suite.Suite:
    return suite.build()


def test_the_suite_is_stratified_and_holds_unseen_pairs_apart(built):
    counts = [len(group) for group in (built.prompts, built.unseen, built.minutes, built.switching)]
    assert counts == [112, 48, 24, 24]
    scenes = [script.segments[0].scene for script in built.prompts]
    for attribute in ("motion", "background"):
        values = [scene.value(attribute) for scene in scenes]
        tally = [values.count(value) for value in VALUES[attribute]]
        assert max(tally) - min(tally) <= 1
    pairs = [(s.things[0].colour, s.things[0].shape) for s in scenes]
    assert {pairs.count(pair) for pair in world.SEEN_PAIRS} <= {5, 6}
    assert not set(pairs) & set(world.UNSEEN_PAIRS)
    unseen = [script.segments[0].scene.things[0] for script in built.unseen]
    assert [(t.colour, t.shape) for t in unseen] == [
        p for p in world.UNSEEN_PAIRS for _ in range(24)
    ]
    assert {shape for _, shape in pairs} == set(SHAPES)


def test_the_suite_depends_on_the_seed_only():
    assert suite.build(**SMALL) == suite.build(**SMALL) != suite.build(**SMALL, seed=1)


def test_switches_are_on_time_even_and_seen(built):
    changed = []
    for script in built.switching:
        assert [e[0] for e in script.events()] == [0, 13, 26, 39, 52, 65, 78]
        assert script.segments[-1].start + 16 <= world.chunk_start(suite.MINUTE)
        for old, new in itertools.pairwise(script.segments):
            changed += [a for a in ATTRIBUTES if old.scene.value(a) != new.scene.value(a)]
            assert (new.scene.things[0].colour, new.scene.things[0].shape) in world.SEEN_PAIRS
    assert [changed.count(a) for a in ATTRIBUTES] == [36] * 4


def test_jobs_carry_captions_and_different_seeds():
    built = suite.build(**SMALL)
    asked = suite.jobs(built.switching, suite.MINUTE, 70)
    assert [job.seed for job in asked] == [70, 71] and {job.chunks for job in asked} == {80}
    first = built.switching[0].segments
    assert asked[0].events[0] == (0, "start", first[0].caption)
    assert asked[0].events[1] == (13, "switch", first[1].caption)


@pytest.mark.parametrize(
    "video",
    [np.zeros((68, 64, 64, 3), np.uint8), np.zeros((69, 64, 64, 3), np.float32)],
    ids=["short", "float"],
)
def test_wrong_videos_are_refused(video):
    with pytest.raises(ValueError, match="expected uint8"):
        suite.evaluate(lambda jobs: [video for _ in jobs], prompts=1, per_unseen=0, minutes=0)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(10, 10, 0.7225, 1.0), (0, 20, 0.0, 0.1611), (90, 112, 0.7206, 0.8665)],
)
def test_wilson_interval(right, n, low, high):
    found = suite.rate([True] * right + [False] * (n - right))
    np.testing.assert_allclose([found["low"], found["high"]], [low, high], atol=5e-4)
    assert found["value"] == right / n and found["n"] == n


def test_no_hits_no_rate():
    assert suite.rate([]) == {"value": None, "low": None, "high": None, "n": 0}
