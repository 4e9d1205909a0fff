"""What a change of prompt looks like, by what becomes of the memory; `longlive eval --suite
switch`. Table 4 of LongLive 1.0 (with and without KV recache), on the toy world.

Videos of about 12 s are made once. From each, every way of going on is played for 4.5 s: a switch
of one attribute with the memory re-read (six forms), kept or emptied; a cut to another scene; and
the old prompt, which says what is seen where nothing changes. Of a switch is measured

- *shown*: frames until the judge reads the new value: the end of the first window after the switch
  in which it does. A window is 4 frames, for motion 12, so that no value is lower;
- *held*: whether the new value is read in the fourth second;
- *others*: whether the attributes that were to stay are then read as in the last second before;
- *jump*: how much the picture changes across the switch, and *largest jump*: the most that it
  changes from one frame to the next in the second after it. Mean absolute differences of pixels, in
  medians of those from frame to frame before the switch; scenes that stand still have none.

Rendered videos and their reconstructions, through the same measures, are the baselines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import rollout
from longlive_jax.bench_session import WAYS
from longlive_jax.config import Recache
from longlive_jax.data.caption import ATTRIBUTES, caption
from longlive_jax.data.toy_world import (
    FPS,
    Script,
    Segment,
    chunk_start,
    draw_scene,
    draw_switch,
    opening,
    render,
    switch,
)
from longlive_jax.eval.toy import read
from longlive_jax.eval.toy_suite import LATENTS, Reconstruct, Video, agreement, rate
from longlive_jax.events import CUT_PREFIX
from longlive_jax.model import Model
from longlive_jax.rollout import Rollout
from longlive_jax.sampler import Solver
from longlive_jax.session import State
from longlive_jax.vae.vae import init_carry

LEAD, TAIL = 16, 6  # chunks before the change (11.8 s: sinks and window lie apart), and after it
CHANGE = chunk_start(LEAD, LATENTS)
AFTER = chunk_start(LEAD + TAIL, LATENTS) - CHANGE  # frames: 72
# Of the frames before, those of the last three chunks but 3: a clip is as long as a whole video of
# nine chunks, and what changes begins with one of them.
BEFORE = chunk_start(3, LATENTS)
WINDOW = {a: 4 for a in ATTRIBUTES} | {"motion": 12}  # frames in which an attribute is read
SOON, LATE = FPS, 3 * FPS  # frames within which a change is to show


@dataclasses.dataclass(frozen=True)
class Case:
    """A scene, and two ways in which it changes at frame `CHANGE`."""

    start: Segment
    switch: Segment
    cut: Segment
    attribute: str  # that the switch changes
    seed: int


Clips = dict[str, Video]  # by way of going on, `BEFORE` frames and `AFTER` frames
Player = Callable[[Sequence[Case]], Iterable[tuple[Case, Clips]]]


@dataclasses.dataclass(frozen=True)
class Branch:
    """A way of going on: what the first chunk's prompt is and that of the others, and what becomes
    of the memory. The state's text is the new one already.
    """

    told: Callable[[Case], tuple[str, str]]
    memory: Callable[[Model, State, Recache | None], Rollout]
    how: Recache | None = None


def _keep(model: Model, state: State, how: Recache | None) -> Rollout:
    return state.rollout


def _reset(model: Model, state: State, how: Recache | None) -> Rollout:
    return rollout.forget(state.rollout, _everyone(state))


def _recache(model: Model, state: State, how: Recache | None) -> Rollout:
    choices = dict(stream=model.config.stream, how=how)
    return rollout.recache(model.dit, state.rollout, state.text, _everyone(state), **choices)


def _new_shot(model: Model, state: State, how: Recache | None) -> Rollout:
    return dataclasses.replace(state.rollout, shot=state.rollout.shot + 1)


def _everyone(state: State) -> jax.Array:
    return jnp.ones(state.rollout.frame.shape, bool)


_MEMORY = {"recache": _recache, "keep": _keep, "reset": _reset}

SWITCHES = {
    name: Branch(lambda case: (case.switch.caption,) * 2, _MEMORY[mode], how)
    for name, (mode, how) in WAYS.items()
}
# The prefix of a cut: in every prompt of the shot, as in training, or said once, as sessions do.
CUTS = {
    "prefix kept": Branch(lambda case: (case.cut.caption,) * 2, _new_shot),
    "prefix once": Branch(
        lambda case: (case.cut.caption, case.cut.caption.removeprefix(CUT_PREFIX)), _new_shot
    ),
}
UNCHANGED = {"old prompt": Branch(lambda case: (case.start.caption,) * 2, _keep)}
BRANCHES = SWITCHES | CUTS | UNCHANGED


def build(count: int, seed: int) -> tuple[Case, ...]:
    """`count` cases, the attributes of their switches in turn; half of the captions are canonical,
    half varied.
    """
    rng = np.random.default_rng(seed)
    return tuple(_case(rng, i, 1_000_000 * (seed + 1) + i) for i in range(count))


def _case(rng: np.random.Generator, number: int, seed: int) -> Case:
    turn, place = divmod(number, len(ATTRIBUTES))
    words, attribute = (rng if turn % 2 else None), ATTRIBUTES[place]
    scene, other = draw_scene(rng), draw_scene(rng)
    start = opening(rng, scene, caption(scene, words))
    changed = draw_switch(rng, scene, attribute)
    return Case(
        start,
        switch(start, changed, caption(changed, words), CHANGE),
        opening(rng, other, CUT_PREFIX + caption(other, words), CHANGE),
        attribute,
        seed,
    )


def truth(case: Case) -> Clips:
    """What a perfect model would show."""
    frames, first = BEFORE + AFTER, CHANGE - BEFORE
    endings = {"switch": case.switch, "cut": case.cut}
    return {name: render(Script((case.start, end)), frames, first) for name, end in endings.items()}


# ---- measures


def shown(after: Video, attribute: str, value: str) -> int | None:
    """Frames until the judge has read `value`; None if it has not in three seconds."""
    width = WINDOW[attribute]
    for end in range(width, LATE + 1):
        seen = read(after[end - width : end])
        if seen is not None and seen.value(attribute) == value:
            return end
    return None


def changes(video: Video) -> np.ndarray:
    """Mean absolute difference of pixels from each frame to the next."""
    return np.abs(np.diff(video.astype(np.float32), axis=0)).mean((1, 2, 3))


def jumps(clip: Video) -> tuple[float, float] | None:
    """The jump across the change and the largest one in the second after it; None where the picture
    stands still before.
    """
    moved, at = changes(clip), len(clip) - AFTER - 1
    usual = float(np.median(moved[:at]))
    after = moved[at + 1 : at + 1 + SOON]
    return (float(moved[at]) / usual, float(after.max()) / usual) if usual else None


@dataclasses.dataclass(frozen=True)
class Switched:
    """What is seen of one switch."""

    attribute: str
    shown: int | None
    held: bool
    others: dict[str, bool]  # whether each other attribute stayed
    jumps: tuple[float, float] | None


def see_switch(case: Case, clip: Video) -> Switched:
    """Measures the switch of a clip."""
    before, after = clip[:-AFTER], clip[-AFTER:]
    wanted, moves = case.switch.scene, case.start.scene.value("motion") != "stays still"
    was, now = read(before[-SOON:]), read(after[LATE : LATE + SOON])
    stayed = agreement(now if was else None, was or wanted)
    return Switched(
        case.attribute,
        shown(after, case.attribute, wanted.value(case.attribute)),
        agreement(now, wanted)[case.attribute],
        {a: stayed[a] for a in ATTRIBUTES if a != case.attribute},
        jumps(clip) if moves else None,
    )


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is seen of one cut, attribute by attribute."""

    shown: dict[str, int | None]
    held: dict[str, bool]


def see_cut(case: Case, clip: Video) -> Cut:
    """Measures the cut of a clip."""
    after, wanted = clip[-AFTER:], case.cut.scene
    frames = {a: shown(after, a, wanted.value(a)) for a in ATTRIBUTES}
    return Cut(frames, agreement(read(after[LATE : LATE + SOON]), wanted))


# ---- scores


def _within(frames: Iterable[int | None], limit: int) -> dict[str, Any]:
    return rate([n is not None and n <= limit for n in frames])


def _quantiles(values: Sequence[float]) -> dict[str, float | int | None]:
    low, high = (float(np.quantile(values, q)) if values else None for q in (0.5, 0.9))
    return {"median": low, "p90": high, "n": len(values)}


def _median(frames: Sequence[int | None]) -> float | None:
    """None where half of them never were."""
    middle = float(np.median([np.inf if n is None else n for n in frames]))
    return middle if np.isfinite(middle) else None


def _of_switches(seen: Sequence[Switched]) -> dict[str, Any]:
    frames, jumped = [s.shown for s in seen], [s.jumps for s in seen if s.jumps]
    return {
        "frames_until_shown": _median(frames),
        "shown_1s": _within(frames, SOON),
        "shown_3s": _within(frames, LATE),
        "held": rate([s.held for s in seen]),
        "others": rate([all(s.others.values()) for s in seen]),
        "jump": _quantiles([jump for jump, _ in jumped]),
        "largest_jump": _quantiles([largest for _, largest in jumped]),
    }


def score_switches(seen: Sequence[Switched]) -> dict[str, Any]:
    """Medians and rates of all, of the switches of each attribute, and of its staying when another
    one switches.
    """
    by_attribute = {a: [s for s in seen if s.attribute == a] for a in ATTRIBUTES}
    stayed = {a: [s.others[a] for s in seen if a in s.others] for a in ATTRIBUTES}
    return {
        **_of_switches(seen),
        "others_by_attribute": {a: rate(hits) for a, hits in stayed.items()},
        "by_attribute": {a: _of_switches(part) for a, part in by_attribute.items() if part},
    }


def score_cuts(seen: Sequence[Cut]) -> dict[str, Any]:
    """Rates of all attributes together, and of each."""
    soon = [{a: n is not None and n <= SOON for a, n in cut.shown.items()} for cut in seen]
    groups = {"right_1s": soon, "held": [cut.held for cut in seen]}
    return {
        **{name: rate([all(hit.values()) for hit in hits]) for name, hits in groups.items()},
        **{
            f"{name}_by_attribute": {a: rate([hit[a] for hit in hits]) for a in ATTRIBUTES}
            for name, hits in groups.items()
        },
    }


def score(pairs: Iterable[tuple[Case, Clips]]) -> dict[str, dict[str, Any]]:
    """Scores of every way of going on that the clips hold, cuts as cuts, all others as switches."""
    switched: dict[str, list[Switched]] = {}
    cut: dict[str, list[Cut]] = {}
    for case, clips in pairs:
        for name, clip in clips.items():
            if name in CUTS or name == "cut":
                cut.setdefault(name, []).append(see_cut(case, clip))
            else:
                switched.setdefault(name, []).append(see_switch(case, clip))
    return {
        "switches": {name: score_switches(seen) for name, seen in switched.items()},
        "cuts": {name: score_cuts(seen) for name, seen in cut.items()},
    }


def evaluate(
    play: Player, *, count: int = 112, seed: int = 0, reconstruct: Reconstruct | None = None
) -> dict[str, Any]:
    """Scores a model: `switches` and `cuts` by way of going on, and the same of `baselines`, the
    rendered truth and what the VAE makes of it. Rates are dicts `value low high n` (Wilson, 95 %),
    times are frames, jumps are dicts `median p90 n`.
    """
    cases = build(count, seed)
    baselines: dict[str, Any] = {"ground_truth": score((case, truth(case)) for case in cases)}
    if reconstruct is not None:
        baselines["reconstruction"] = score(_reconstructed(cases, reconstruct))
    return {**score(play(cases)), "baselines": baselines}


def _reconstructed(cases: Sequence[Case], reconstruct: Reconstruct) -> Iterator[tuple[Case, Clips]]:
    real = [truth(case) for case in cases]
    made = {name: reconstruct([clips[name] for clips in real]) for name in real[0]}
    for case, *clips in zip(cases, *made.values(), strict=True):
        yield case, dict(zip(made, clips, strict=True))


# ---- videos


def player(model: Model, *, steps: int | None = None, batch: int = 16) -> Player:
    """A callable that makes the clips of cases, `batch` side by side: each case's video up to the
    change once, and from there every branch.
    """
    solver = model.solver(steps)

    def play(cases: Sequence[Case]) -> Iterator[tuple[Case, Clips]]:
        for i in range(0, len(cases), batch):
            group = list(cases[i : i + batch])
            rows = group + [group[-1]] * (batch - len(group))  # one compiled shape
            clips = _clips(model, rows, solver)
            for row, case in enumerate(group):
                yield case, {name: clip[row] for name, clip in clips.items()}

    return play


def _clips(model: Model, cases: Sequence[Case], solver: Solver) -> dict[str, np.ndarray]:
    config, rows = model.config, len(cases)
    text = model.prompt_kv([case.start.caption for case in cases])
    memory = rollout.begin(config, [case.seed for case in cases], text.k.dtype)
    state = State(memory, init_carry(model.vae, rows, config.height, config.width), text)
    lead = []
    for chunk in range(LEAD):
        state, frames = _advance(model, state, solver, first=chunk == 0)
        lead = [*lead[-2:], frames]
    before = np.concatenate(lead, 1)[:, -BEFORE:]
    return {
        name: np.concatenate([before, *_branch(model, state, solver, cases, branch)], 1)
        for name, branch in BRANCHES.items()
    }


def _branch(
    model: Model, start: State, solver: Solver, cases: Sequence[Case], branch: Branch
) -> Iterator[np.ndarray]:
    """The chunks after the change; `start` stays as it is."""
    told = zip(*(branch.told(case) for case in cases), strict=True)
    opening_text, text = (model.prompt_kv(prompts) for prompts in told)
    state = dataclasses.replace(jax.tree.map(jnp.copy, start), text=opening_text)
    state = dataclasses.replace(state, rollout=branch.memory(model, state, branch.how))
    for _ in range(TAIL):
        state, frames = _advance(model, state, solver, first=False)
        state = dataclasses.replace(state, text=text)
        yield frames


def _advance(
    model: Model, state: State, solver: Solver, *, first: bool
) -> tuple[State, np.ndarray]:
    stream, guidance = model.config.stream, model.config.sampler.guidance
    noise = rollout.noise(state.rollout, stream.chunk)
    choices = dict(stream=stream, solver=solver, guidance=guidance)
    memory, latents = rollout.generate(model.dit, state.rollout, state.text, noise, **choices)
    carry, pixels = rollout.decode(model.vae, state.carry, latents, first=first)
    return State(memory, carry, state.text), np.asarray(jax.block_until_ready(pixels))
