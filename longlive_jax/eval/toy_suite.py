"""The toy suite: does a model obey captions it can be checked on?

`evaluate` asks a model for four groups of videos and scores them with the judge of
`longlive_jax.eval.toy`:

- *prompts*: short videos (about 4 s) of seen pairs, judged over the last 2 s: `colour`, `shape`,
  `motion`, and motion by class;
- *unseen*: the same for the two held-out pairs; right if colour and shape both are: `unseen_pairs`;
- *minutes*: one prompt for one minute; colour, shape and motion all right in the last 2 s:
  `end_of_60s`;
- *switching*: one minute with a one-attribute switch about every 10 s, attributes evenly drawn;
  right if the new value is read within the first second in which the new prompt applies:
  `switch_1s`. Appearance is read in the last quarter of that second, motion (which takes time to
  tell) in its last three quarters.

Half the captions are canonical, half varied. An unreadable video is wrong everywhere.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from longlive_jax.data.caption import (
    ATTRIBUTES,
    BACKGROUNDS,
    MOTIONS,
    VALUES,
    Scene,
    Thing,
    caption,
)
from longlive_jax.data.toy_world import (
    FPS,
    SEEN_PAIRS,
    SIZE,
    UNSEEN_PAIRS,
    Script,
    chunk_start,
    draw_switch,
    opening,
    render,
    switch,
)
from longlive_jax.eval.toy import read

SHORT, MINUTE = 6, 80  # chunks: 69 frames (4.3 s), 957 frames (59.8 s)
LENGTHS = {"prompts": SHORT, "unseen": SHORT, "minutes": MINUTE, "switching": MINUTE}
SWITCH_EVERY = 13  # chunks: 9.75 s
LAST = 2 * FPS  # frames judged at the end of a video
WITHIN = {a: (12, 16) for a in ATTRIBUTES} | {"motion": (4, 16)}  # frames after a switch
LATENTS = 3  # latent frames a chunk


@dataclasses.dataclass(frozen=True)
class Job:
    """One video to generate: (chunk, kind, caption) events, how many chunks, and its seed."""

    events: tuple[tuple[int, str, str], ...]
    chunks: int
    seed: int


Video = np.ndarray  # uint8 [t, 64, 64, 3]
Generate = Callable[[Sequence[Job]], Iterable[Video]]
Reconstruct = Callable[[Sequence[Video]], Iterable[Video]]


@dataclasses.dataclass(frozen=True)
class Suite:
    """The scripts of the four groups."""

    prompts: tuple[Script, ...]
    unseen: tuple[Script, ...]
    minutes: tuple[Script, ...]
    switching: tuple[Script, ...]


def rate(hits: Sequence[bool]) -> dict[str, float | int | None]:
    """A fraction with its Wilson 95 % interval: value, low, high, n. Without hits all are None."""
    n, z = len(hits), 1.959964
    if not n:
        return {"value": None, "low": None, "high": None, "n": 0}
    value = float(np.mean(hits))
    middle = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(value * (1 - value) / n + z * z / (4 * n * n)))
    return {"value": value, "low": max(0.0, middle - half), "high": min(1.0, middle + half), "n": n}


def _evenly(rng: np.random.Generator, values: Sequence, n: int) -> list:
    """n values in random order, each as often as the others, give or take one."""
    repeats = max(1, -(-n // len(values)))
    order = np.concatenate([rng.permutation(len(values)) for _ in range(repeats)])[:n]
    return [values[i] for i in rng.permutation(order)]


def _scenes(rng: np.random.Generator, pairs: Sequence[tuple[str, str]], n: int) -> list[Scene]:
    columns = (_evenly(rng, values, n) for values in (pairs, MOTIONS, BACKGROUNDS))
    return [
        Scene((Thing(*pair, motion),), background)
        for pair, motion, background in zip(*columns, strict=True)
    ]


def _still(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[Script, ...]:
    """One-prompt scripts, every other caption canonical."""
    texts = [caption(scene, rng if i % 2 else None) for i, scene in enumerate(scenes)]
    return tuple(
        Script((opening(rng, scene, text),)) for scene, text in zip(scenes, texts, strict=True)
    )


def _switching(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[Script, ...]:
    boundaries = range(SWITCH_EVERY, MINUTE, SWITCH_EVERY)
    plan = iter(_evenly(rng, ATTRIBUTES, len(scenes) * len(boundaries)))
    scripts = []
    for i, script in enumerate(_still(rng, scenes)):
        segments = list(script.segments)
        for chunk in boundaries:
            scene = draw_switch(rng, segments[-1].scene, next(plan))
            text = caption(scene, rng if i % 2 else None)
            segments.append(switch(segments[-1], scene, text, chunk_start(chunk, LATENTS)))
        scripts.append(Script(tuple(segments)))
    return tuple(scripts)


def build(*, prompts: int = 112, per_unseen: int = 24, minutes: int = 24, seed: int = 0) -> Suite:
    """The suite for a seed, attributes stratified; `minutes` videos in each one-minute group."""
    rng = np.random.default_rng(seed)
    unseen = [scene for pair in UNSEEN_PAIRS for scene in _scenes(rng, [pair], per_unseen)]
    return Suite(
        _still(rng, _scenes(rng, SEEN_PAIRS, prompts)),
        _still(rng, unseen),
        _still(rng, _scenes(rng, SEEN_PAIRS, minutes)),
        _switching(rng, _scenes(rng, SEEN_PAIRS, minutes)),
    )


def jobs(scripts: Sequence[Script], chunks: int, first_seed: int = 0) -> list[Job]:
    """What to ask of a model for these scripts; seeds count up from `first_seed`."""
    return [Job(s.events(LATENTS), chunks, first_seed + i) for i, s in enumerate(scripts)]


def agreement(seen: Scene | None, wanted: Scene) -> dict[str, bool]:
    """Per attribute, whether what the judge read is what was asked for; None is wrong."""
    return {a: seen is not None and seen.value(a) == wanted.value(a) for a in ATTRIBUTES}


def _at_end(scripts: Sequence[Script], videos: Iterable[Video]) -> list[dict[str, bool]]:
    return [
        agreement(read(video[-LAST:]), script.segments[-1].scene)
        for script, video in zip(scripts, videos, strict=True)
    ]


def switches(scripts: Sequence[Script], videos: Iterable[Video]) -> list[tuple[str, bool]]:
    """(changed attribute, whether its new value is visible in time) of every switch."""
    hits = []
    for script, video in zip(scripts, videos, strict=True):
        for old, new in zip(script.segments, script.segments[1:], strict=False):
            changed = [a for a in ATTRIBUTES if old.scene.value(a) != new.scene.value(a)]
            for attribute in changed:
                low, high = (new.start + frame for frame in WITHIN[attribute])
                hits.append((attribute, agreement(read(video[low:high]), new.scene)[attribute]))
    return hits


def _together(hit: dict[str, bool], *attributes: str) -> bool:
    return all(hit[a] for a in attributes)


@dataclasses.dataclass(frozen=True)
class Videos:
    """Videos for the four groups of a suite, each in the order of its scripts; read once."""

    prompts: Iterable[Video]
    unseen: Iterable[Video]
    minutes: Iterable[Video]
    switching: Iterable[Video]


def score(suite: Suite, videos: Videos) -> dict:
    """Judges one video for every script: the fields of `evaluate`, without the baselines."""
    prompts, unseen = _at_end(suite.prompts, videos.prompts), _at_end(suite.unseen, videos.unseen)
    minutes = _at_end(suite.minutes, videos.minutes)
    changes = switches(suite.switching, videos.switching)
    asked = [s.segments[0].scene.value("motion") for s in suite.prompts]
    by_class = {
        motion: rate([hit["motion"] for hit, a in zip(prompts, asked, strict=True) if a == motion])
        for motion in MOTIONS
    }
    ends = [_together(hit, "colour", "shape", "motion") for hit in minutes]
    return {
        **{a: rate([hit[a] for hit in prompts]) for a in ATTRIBUTES},
        "unseen_pairs": rate([_together(hit, "colour", "shape") for hit in unseen]),
        "switch_1s": rate([hit for _, hit in changes]),
        "end_of_60s": rate(ends),
        "motion_by_class": by_class,
        "switch_by_attribute": {a: rate([h for b, h in changes if b == a]) for a in ATTRIBUTES},
        "end_of_60s_by_attribute": {a: rate([hit[a] for hit in minutes]) for a in ATTRIBUTES},
    }


def _rendered(scripts: Sequence[Script], chunks: int) -> Iterable[Video]:
    return (render(script, chunk_start(chunks, LATENTS)) for script in scripts)


def ground_truth(suite: Suite) -> Videos:
    """What a perfect model would show."""
    short = [_rendered(group, SHORT) for group in (suite.prompts, suite.unseen)]
    return Videos(*short, *(_rendered(g, MINUTE) for g in (suite.minutes, suite.switching)))


def shuffled(suite: Suite) -> Suite:
    """The suite with its captions dealt to other videos: what the judge scores by chance.

    The short videos are shuffled over both of their groups, so that an unseen pair is asked of a
    video of a seen one. Switches keep their time and attribute, the values asked for are redrawn.
    """
    rng = np.random.default_rng(0)

    def derange(scripts: Sequence[Script]) -> tuple[Script, ...]:
        order = rng.permutation(len(scripts))  # one cycle: nobody keeps its own
        dealt = dict(zip(order, np.roll(order, 1), strict=True))
        return tuple(scripts[dealt[i]] for i in range(len(scripts)))

    short = derange(suite.prompts + suite.unseen)
    n = len(suite.prompts)
    switching = tuple(_redrawn(rng, script) for script in suite.switching)
    return Suite(short[:n], short[n:], derange(suite.minutes), switching)


def _redrawn(rng: np.random.Generator, script: Script) -> Script:
    """The same switches, each to a value drawn at random from all of the attribute's."""
    segments = list(script.segments[:1])
    for old, new in zip(script.segments, script.segments[1:], strict=False):
        attribute = next(a for a in ATTRIBUTES if old.scene.value(a) != new.scene.value(a))
        values = [v for v in VALUES[attribute] if v != segments[-1].scene.value(attribute)]
        scene = segments[-1].scene.change(attribute, values[int(rng.integers(len(values)))])
        segments.append(dataclasses.replace(new, scene=scene))
    return Script(tuple(segments))


def _checked(videos: Iterable[Video], chunks: int) -> Iterable[Video]:
    expected = (chunk_start(chunks, LATENTS), SIZE, SIZE, 3)
    for video in videos:
        if video.shape != expected or video.dtype != np.uint8:
            raise ValueError(f"expected uint8 {expected}, got {video.dtype} {video.shape}")
        yield video


def evaluate(
    generate: Generate,
    *,
    prompts: int = 112,
    per_unseen: int = 24,
    minutes: int = 24,
    seed: int = 0,
    reconstruct: Reconstruct | None = None,
) -> dict:
    """Scores a model; every rate is a dict `value low high n` (Wilson, 95 %).

    `generate` is called once per group, with jobs of equal length, and returns or yields their
    videos in order (uint8 [t, 64, 64, 3], all `12 * chunks - 3` frames). `reconstruct`, if given,
    takes videos through the VAE and back.

    Returns `colour shape motion background unseen_pairs switch_1s end_of_60s`, the groups
    `motion_by_class switch_by_attribute end_of_60s_by_attribute`, and `baselines`: the same
    fields for `ground_truth`, `reconstruction` (None without `reconstruct`) and `shuffled`
    (rendered videos against other videos' captions: chance). Raises `ValueError` for a video of
    another length, size or type, or for too few or too many of them.
    """
    suite = build(prompts=prompts, per_unseen=per_unseen, minutes=minutes, seed=seed)
    made, next_seed = {}, 1_000_000 * (seed + 1)
    for group, chunks in LENGTHS.items():
        asked = jobs(getattr(suite, group), chunks, next_seed)
        made[group] = _checked(generate(asked), chunks)
        next_seed += len(asked)
    scores = score(suite, Videos(**made))
    baselines = {
        "ground_truth": score(suite, ground_truth(suite)),
        "reconstruction": None,
        "shuffled": score(shuffled(suite), ground_truth(suite)),
    }
    if reconstruct is not None:
        truth = ground_truth(suite)
        again = {group: reconstruct(list(getattr(truth, group))) for group in LENGTHS}
        baselines["reconstruction"] = score(suite, Videos(**again))
    return {**scores, "baselines": baselines}
