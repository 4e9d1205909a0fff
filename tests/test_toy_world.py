"""The toy world: captions both ways, motion, switches, cuts, held-out pairs, random access."""

import itertools

import numpy as np
import pytest

from longlive_jax.data import toy_world as world
from longlive_jax.data.caption import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    CUT_PREFIX,
    MOTIONS,
    SHAPES,
    VALUES,
    WORDS,
    Scene,
    Thing,
    caption,
    parse,
)

RED = Scene((Thing("red", "circle", "moves left"),), "striped")


def alone(scene: Scene, seed: int = 0) -> world.Script:
    return world.Script((world.opening(np.random.default_rng(seed), scene, caption(scene)),))


def centre(frames: np.ndarray) -> np.ndarray:
    """Circular mean (x, y) of the bright pixels of each frame."""
    bright = (frames.max(-1) > 127).astype(float)
    phase = np.exp(2j * np.pi * (np.arange(64) + 0.5) / 64)
    sums = (bright.sum(1) @ phase, bright.sum(2) @ phase)
    return np.stack([np.angle(s) / (2 * np.pi) * 64 % 64 for s in sums], -1)


def test_canonical_captions():
    assert caption(RED) == "a red circle moves left over a striped background"
    two = Scene((RED.things[0], Thing("orange", "triangle", "bounces")), "black")
    said = "a red circle moves left and an orange triangle bounces over a black background"
    assert caption(two) == said


@pytest.mark.parametrize("varied", [False, True], ids=["canonical", "varied"])
def test_parse_reads_back_every_caption(varied):
    rng = np.random.default_rng(1)
    attributes = itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS)
    scenes = [
        Scene((Thing(c, s, m),), b) for c, s, m, b in itertools.islice(attributes, 0, None, 4)
    ]
    scenes += [world.draw_scene(rng, things=2, unseen=True) for _ in range(100)]
    for scene in scenes:
        text = caption(scene, rng if varied else None)
        assert parse(text) == scene, text
        assert parse(CUT_PREFIX + text) == scene, text
        assert set(text.split()) <= set(WORDS), text


def test_variations_are_many_and_words_are_few():
    rng = np.random.default_rng(2)
    assert len({caption(RED, rng) for _ in range(400)}) > 150
    assert len(WORDS) <= 90
    said = " ".join(caption(world.draw_scene(rng, things=2, unseen=True), rng) for _ in range(250))
    assert set(said.split()) | {"the", "scene", "transitions"} == set(WORDS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a red circle moves left",
        "a pink circle moves left over a grey background",
    ]
    + ["a red circle moves left and a square bounces over a grey background"],
)
def test_parse_refuses_other_sentences(text):
    with pytest.raises(ValueError, match="not a caption"):
        parse(text)


def test_scenes_refuse_what_the_world_lacks():
    with pytest.raises(ValueError, match="'pink' is not a colour"):
        Thing("pink", "circle", "bounces")
    with pytest.raises(ValueError, match="'sky' is not a background"):
        Scene(RED.things, "sky")
    with pytest.raises(ValueError, match="one or two things"):
        Scene((), "black")


def test_backgrounds_are_dark_and_objects_bright():
    assert max(picture.max() for picture in world.BACKDROPS.values()) <= 0.3 * 255 + 1
    assert min(max(rgb) for rgb in world.RGB.values()) >= 0.85


@pytest.mark.parametrize("shape", SHAPES)
def test_size_of_shapes(shape):
    still = Scene((Thing("white", shape, "stays still"),), "black")
    cover = world.render(alone(still), 1)[0].max(-1) / 255
    wide, high = np.ptp(np.nonzero(cover > 0.1), axis=1)[::-1] + 1
    assert abs(cover.sum() - world.AREAS[shape]) < 5
    assert 16 <= wide <= 25 and 16 <= high <= 22


@pytest.mark.parametrize("motion", MOTIONS)
def test_pixels_follow_the_displacement(motion):
    script = alone(Scene((Thing("white", "square", motion),), "navy"))
    frames = np.arange(130)
    wanted = script.segments[0].position(0, frames) % 64
    error = (centre(world.render(script, 130)) - wanted + 32) % 64 - 32
    assert np.abs(error).max() < 0.6


STEPS = {"stays still": (0, 0), "moves left": (-2, 0), "moves right": (2, 0)}
STEPS |= {"moves up": (0, -2), "moves down": (0, 2)}


@pytest.mark.parametrize("motion", STEPS)
def test_straight_motions_are_steady(motion):
    steps = np.diff(world.displacement(motion, np.arange(50)), axis=0)
    np.testing.assert_allclose(steps, np.broadcast_to(STEPS[motion], steps.shape))


def test_hops_and_circles_return():
    hop = world.displacement("bounces", np.arange(17))
    assert hop[8].tolist() == [0, -16] and np.abs(hop[16]).max() < 1e-9
    circle = world.displacement("circles", np.arange(33))
    np.testing.assert_allclose(np.hypot(circle[:, 0] + 10, circle[:, 1]), 10)
    assert np.abs(circle[32]).max() < 1e-9 and circle[16, 0] == -20


def test_render_is_random_access_and_endless():
    script = world.random_script(np.random.default_rng(3), 8, world.Recipe(0.4, 0.2, 0.5))
    whole = world.render(script, 200)
    for start, frames in [(0, 1), (7, 30), (44, 90), (150, 50)]:
        np.testing.assert_array_equal(
            world.render(script, frames, start), whole[start : start + frames]
        )
    far = world.render(alone(RED), 3, 100_000)  # wraps every 32 frames
    np.testing.assert_array_equal(far, world.render(alone(RED), 3, 100_000 % 32))


@pytest.mark.parametrize(("latents", "starts"), [(3, [0, 9, 21, 33]), (8, [0, 29, 61, 93])])
def test_chunks_start_where_the_latents_do(latents, starts):
    assert [world.chunk_start(chunk, latents) for chunk in range(4)] == starts
    recipe = world.Recipe(switch_rate=0.5, cut_rate=0.5, latents=latents)
    script = world.random_script(np.random.default_rng(4), 9, recipe)
    assert [event[0] for event in script.events(latents)] == list(range(9))
    assert [s.start for s in script.segments] == [world.chunk_start(k, latents) for k in range(9)]
    assert [event[1:] for event in script.events(latents)] == [
        (s.kind, s.caption) for s in script.segments
    ]


def test_scenes_begin_near_the_centre():
    rng = np.random.default_rng(5)
    for things, centres in [(1, [32]), (2, [16, 48])]:
        seen = []
        for _ in range(150):
            scene = world.draw_scene(rng, things=things)
            segment = world.opening(rng, scene, "")
            for i, x in enumerate(centres):
                path = segment.position(i, np.arange(32))
                straight = scene.things[i].motion in STEPS
                middle = path[0] if straight else (path.min(0) + path.max(0)) / 2
                seen.append(middle - [x, 32])
        assert np.abs(seen).max() == world.SPREAD
        assert np.abs(np.mean(seen, 0)).max() < 1


def scripts(count: int, recipe: world.Recipe) -> list[world.Script]:
    rng = np.random.default_rng(6)
    return [world.random_script(rng, 30, recipe) for _ in range(count)]


def test_unseen_pairs_are_never_drawn():
    assert set(world.UNSEEN_PAIRS) == {("cyan", "triangle"), ("orange", "square")}
    pairs = {
        (thing.colour, thing.shape)
        for script in scripts(25, world.Recipe(0.5, 0.2, 0.5))
        for segment in script.segments
        for thing in segment.scene.things
    }
    assert pairs == set(world.SEEN_PAIRS)
    rng = np.random.default_rng(7)
    asked = {world.draw_scene(rng, unseen=True).things[0] for _ in range(600)}
    assert {(t.colour, t.shape) for t in asked} == set(world.SEEN_PAIRS) | set(world.UNSEEN_PAIRS)


def test_switches_change_one_attribute_and_nothing_jumps():
    changed = []
    for script in scripts(15, world.Recipe(1.0, 0.0, 0.3)):
        for old, new in itertools.pairwise(script.segments):
            assert new.kind == "switch" and parse(new.caption) == new.scene
            count = len(old.scene.things)
            assert len(new.scene.things) == count
            pairs = {
                (a, i if a != "background" else 0)
                for a in ATTRIBUTES
                for i in range(count)
                if old.scene.value(a, i) != new.scene.value(a, i)
            }
            assert len(pairs) == 1
            changed += [attribute for attribute, _ in pairs]
            for i in range(count):
                np.testing.assert_allclose(
                    new.position(i, new.start), old.position(i, new.start), atol=1e-9
                )
    shares = [changed.count(a) / len(changed) for a in ATTRIBUTES]
    assert min(shares) > 0.18 and max(shares) < 0.32


def test_other_switches_leave_the_motion_alone():
    first = world.opening(np.random.default_rng(8), RED, "")
    second = world.switch(first, RED.change("colour", "green"), "", 21)
    np.testing.assert_array_equal(
        first.position(0, np.arange(60)), second.position(0, np.arange(60))
    )


def test_cuts_begin_a_new_scene():
    for script in scripts(10, world.Recipe(0.0, 1.0, 0.3)):
        for segment in script.segments[1:]:
            assert segment.kind == "cut" and segment.caption.startswith(CUT_PREFIX)
            assert parse(segment.caption) == segment.scene
            assert set(segment.began) == {segment.start}


def test_rates_are_kept():
    drawn = scripts(60, world.Recipe(0.2, 0.1, 0.25))
    kinds = [s.kind for script in drawn for s in script.segments]
    boundaries = 60 * 29
    assert abs(kinds.count("switch") / boundaries - 0.2) < 0.03
    assert abs(kinds.count("cut") / boundaries - 0.1) < 0.02
    openings = [s for script in drawn for s in script.segments if s.kind != "switch"]
    assert abs(np.mean([len(s.scene.things) == 2 for s in openings]) - 0.25) < 0.1
    texts = [(s.caption.removeprefix(CUT_PREFIX), s.scene) for d in drawn for s in d.segments]
    assert abs(np.mean([text == caption(scene) for text, scene in texts]) - 0.5) < 0.06


def test_two_things_differ_in_colour():
    for script in scripts(12, world.Recipe(0.6, 0.1, 1.0)):
        for segment in script.segments:
            assert len({thing.colour for thing in segment.scene.things}) == 2


def test_every_value_is_switched_to():
    rng = np.random.default_rng(9)
    seen = {a: {world.draw_switch(rng, RED, a).value(a) for _ in range(200)} for a in ATTRIBUTES}
    assert seen == {a: set(VALUES[a]) - {RED.value(a)} for a in ATTRIBUTES}


def test_clips_depend_on_the_seed_only():
    def first(seed):
        return next(world.clips(seed, batch=3, chunks=4))

    frames, drawn = first(10)
    assert frames.shape == (3, 45, 64, 64, 3) and frames.dtype == np.uint8
    again, drawn_again = first(10)
    np.testing.assert_array_equal(frames, again)
    assert drawn == drawn_again and drawn != first(11)[1]
    np.testing.assert_array_equal(frames[1], world.render(drawn[1], 45))
