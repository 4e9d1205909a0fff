"""Sequences of clips: the frames and prompts of the original code, and where they may begin."""

import dataclasses

import pytest

from longlive_jax import config as configs
from longlive_jax.data.montage import Clip, MontageConfig, Window, for_model, plan, starts
from longlive_jax.errors import InputError
from longlive_jax.events import CUT_PREFIX

FIVE = MontageConfig(chunks=5, chunk=8, fps=24)  # 29 + 4 * 32 = 157 frames, 40 latent frames
TWO, PAD, ONE = dict(shot=2), dict(pad=True), dict(one_clip=True)
CLIPS = {
    "s0": [Clip("0.mp4", 190, 30.0, "A"), Clip("1.mp4", 400, 24.0, "B")],
    "s1": [Clip("0.mp4", 2000, 24.0, "A")],
    "s2": [Clip("0.mp4", 100, 24.0, "A"), Clip("3.mp4", 40, 24.0, "B")],
}
SHORT = "remaining videos are too short for the next chunk"
# MultiVideoConcatDataset of the original code: folder, arguments, first frames read of 0.mp4 and of
# the next video, the prompts it gave with | for the prefix, and the latent frames that are valid.
WORKED = [
    ("s0", {}, [0, 36, 76, 116], [0], "A A A A |B", 40),
    ("s1", {}, [0, 29, 61, 93, 125], [], "A A A A A", 40),
    ("s2", {}, [0, 29, 61], [0], SHORT, 32),
    ("s0", TWO, [0, 36, 106, 146], [0], "A A |A A |B", 40),
    ("s1", TWO, [0, 29, 85, 117, 173], [], "A A |A A |A", 40),
    ("s2", TWO, [0, 29], [0], SHORT, 24),
    ("s0", PAD, [0, 36, 76, 116], [0], "A A A A |B", 40),
    ("s1", PAD, [0, 29, 61, 93, 125], [], "A A A A A", 40),
    ("s2", PAD, [0, 29, 61], [0], "A A A |B |B", 32),
    ("s0", PAD | TWO, [0, 36, 106, 146], [0], "A A |A A |B", 40),
    ("s1", PAD | TWO, [0, 29, 85, 117, 173], [], "A A |A A |A", 40),
    ("s2", PAD | TWO, [0, 29], [0], "A A |B |B |B", 24),
    ("s0", ONE | TWO, [0, 36, 106, 146], [], SHORT, 32),
    ("s1", ONE | TWO, [0, 29, 85, 117, 173], [], "A A |A A |A", 40),
    ("s2", ONE | TWO, [0, 29], [], SHORT, 16),
]


@pytest.mark.parametrize(("folder", "choices", "first", "second", "said", "valid"), WORKED)
def test_sequences_are_those_of_the_original_code(folder, choices, first, second, said, valid):
    clips = CLIPS[folder]
    made = plan(clips, dataclasses.replace(FIVE, **choices))
    read = [("0.mp4", start) for start in first] + [(clips[-1].file, start) for start in second]
    counts = [29, *[32] * (len(read) - 1)]
    wanted = [Window(file, start, n) for (file, start), n in zip(read, counts, strict=True)]
    assert list(made.windows) == wanted
    assert made.valid == valid
    if said == SHORT:
        assert (made.reason, made.prompts) == (SHORT, ())
    else:
        prompts = [prompt.replace("|", CUT_PREFIX) for prompt in said.split()]
        assert (made.reason, list(made.prompts)) == ("", prompts)


def test_frames_are_spread_evenly_and_stay_in_the_clip():
    clip = CLIPS["s0"][0]
    windows = plan([clip], dataclasses.replace(FIVE, chunks=4)).windows
    step = clip.fps / FIVE.fps
    assert windows[0].indices(step)[:6] == [0, 1, 2, 4, 5, 6]
    read = [index for window in windows for index in window.indices(step)]
    assert len(read) == 29 + 3 * 32
    assert read == sorted(set(read))
    assert read[-1] < clip.frames
    # One frame less, and the last chunk no longer fits.
    shorter = dataclasses.replace(clip, frames=read[-1])
    assert plan([shorter], dataclasses.replace(FIVE, chunks=4)).reason == SHORT


def test_a_slower_clip_repeats_frames():
    slow = Clip("0.mp4", 100, 12.0, "A")
    (window,) = plan([slow], dataclasses.replace(FIVE, chunks=1)).windows
    assert window.indices(0.5)[:5] == [0, 0, 1, 2, 2]  # halves go to the even number, as in NumPy


def test_a_clip_that_ends_with_a_chunk_leaves_nothing_over():
    clips = [Clip("0.mp4", 29, 24.0, "A"), Clip("1.mp4", 64, 24.0, "B")]
    made = plan(clips, dataclasses.replace(FIVE, chunks=3, shot=2))
    assert [(window.file, window.start) for window in made.windows] == [
        ("0.mp4", 0),
        ("1.mp4", 0),
        ("1.mp4", 32),
    ]
    assert made.prompts == ("A", CUT_PREFIX + "B", "B")


def test_a_clip_of_its_own_may_end_early_where_padding_is_allowed():
    # The original code gives such a sample up where the clip ends exactly with a chunk.
    clips = [Clip("0.mp4", 29, 24.0, "A"), Clip("1.mp4", 640, 24.0, "B")]
    made = plan(clips, dataclasses.replace(FIVE, one_clip=True, pad=True))
    assert (made.valid, made.prompts, made.reason) == (8, ("A",) * 5, "")


def test_a_sequence_that_is_not_there_says_why():
    short = [Clip("0.mp4", 20, 24.0, "A")]
    padded = dataclasses.replace(FIVE, pad=True, least=24)
    assert plan([], FIVE).reason == "no videos with captions"
    assert plan([], dataclasses.replace(FIVE, one_clip=True)).reason == "no videos with captions"
    assert plan(short, padded).reason == "no video can provide the first chunk"
    assert plan(CLIPS["s2"][:1], padded).reason == ""
    assert plan(CLIPS["s2"][1:], padded).reason == "only 8 latent frames, fewer than 24"


@pytest.mark.parametrize("choices", [{}, TWO, ONE, PAD], ids=str)
def test_every_start_gives_a_whole_sequence(choices):
    cfg = dataclasses.replace(FIVE, **choices)
    for clips in CLIPS.values():
        found = starts(clips, cfg)
        assert all(plan(clips, cfg, start).valid == cfg.latents for start in found)
        assert len(found) == len(set(found))
    assert len(starts(CLIPS["s1"], cfg)) >= 40
    assert starts(CLIPS["s2"], cfg) == []
    late = [frame for clip, frame in starts(CLIPS["s0"], cfg) if clip == 1]
    assert late[0] == 0 and late[-1] > 180


@pytest.mark.parametrize("config", [configs.TINY, configs.WAN22_TI2V_5B], ids=lambda c: c.name)
def test_a_model_says_how_long_its_chunks_are(config):
    cfg = for_model(config, 3, shot=2)
    assert cfg.latents == 3 * config.stream.chunk
    assert cfg.frames == 1 + config.vae.time_stride * (cfg.latents - 1)
    assert (cfg.fps, cfg.shot) == (config.fps, 2)


@pytest.mark.parametrize("bad", [dict(chunks=0), dict(fps=0), dict(shot=-1), dict(least=-8)])
def test_numbers_that_make_no_sequence_are_refused(bad):
    with pytest.raises(InputError, match="or more, not"):
        dataclasses.replace(FIVE, **bad)
