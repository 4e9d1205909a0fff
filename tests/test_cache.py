"""The slot cache against the references' rolling caches, call by call, and against lists."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streams
import wan

from longlive_jax.config import Recache, SamplerConfig, StreamConfig
from longlive_jax.dit import cache as slots
from longlive_jax.flow import Flow

CASES = [
    "06_kv_a_nosink",
    "06_kv_a2_first_frame",
    "06_kv_b_sink_chunk",
    "06_kv_b2_sink_one_frame",
    "06_kv_b3_sink_prepended",
    "06_kv_c_pin_merge",
    "06_kv_c4_two_cuts",
    "06_kv_d_rope_offset",
    "06_kv_d2_tscale",
    "06_kv_e_relative",
    "06_kv_e2_relative_prepended",
    "06_kv_f_local_minus1",
]
ATOL = 1e-4  # as the index says of every 06 case


def layout(cfg) -> StreamConfig:
    """What a reference's cache and attention sizes amount to."""
    window = min(cfg["cache_frames"], cfg["max_attention_tokens"] // cfg["tokens_per_frame"])
    pin = cfg["final"]["pinned_len"] // cfg["tokens_per_frame"]
    return StreamConfig(cfg["num_frame_per_block"], window, cfg["sink_size_frames"], pin)


@functools.cache
def attended(name) -> list[list[int]]:
    """The frames that the reference attends, call by call."""
    return json.loads((wan.GOLDEN / "longlive2" / "attended.json").read_text())[name]


def calls(case):
    """x, t, flow, x0 of every call; a first chunk of another length has arrays of its own."""
    names = ("in/x", "in/t", "out/flow", "out/x0")
    parts = [part for part in ("_first", "") if "in/x" + part in case]
    return [row for part in parts for row in zip(*(case[n + part] for n in names), strict=True)]


def channel_last(x):
    return np.moveaxis(x, -3, -1)  # b f c h w -> b f h w c


def chunks(cfg):
    """Of every chunk: its first frame, its frames, its shot and its calls."""
    per_chunk, start = len(cfg["denoise_timesteps"]) + 1, 0
    for chunk in range(cfg["chunks"]):
        frames = (not chunk and cfg["first_chunk_frames"]) or cfg["num_frame_per_block"]
        shot = sum(cut <= chunk for cut in cfg["scene_cut_chunks"])
        yield start, frames, shot, range(chunk * per_chunk, (chunk + 1) * per_chunk)
        start += frames


@pytest.mark.parametrize("name", CASES)
def test_every_call(golden, facts, name):
    case, cfg = golden("longlive2", name), facts("longlive2", name)["config"]
    all_held = lambda number, cache: cache.filled  # noqa: E731
    play(name, case, cfg, layout(cfg), all_held)


def play(name, case, cfg, stream, visible: Callable):
    """Every call over a table of `stream.window` slots; `visible` is what call `number` sees."""
    dit, rows, log = wan.longlive2("gen"), calls(case), attended(name)
    offsets = cfg["rope_offset_per_chunk"] or [0] * cfg["chunks"]
    relative, sinks = cfg["use_relative_rope"], dict(sink=stream.sink, shot_sink=stream.shot_sink)
    cache = slots.empty(dit.cfg, stream, cfg["B"], streams.TOKENS)
    assert len(rows) == len(log) == (len(cfg["denoise_timesteps"]) + 1) * cfg["chunks"]
    for chunk, (start, frames, shot, numbers) in enumerate(chunks(cfg)):
        labels = jnp.int32(start), jnp.int32(chunk), jnp.int32(shot)
        taken, cache = streams.claim(cache, *labels, frames=frames, **sinks)
        text = streams.text(dit, jnp.asarray(case["in/context"][chunk]))
        for number in numbers:
            x, t, flow, x0 = rows[number]
            seen = visible(number, cache)
            shown = [sorted(cache.frame[i][seen[i]].tolist()) for i in range(cfg["B"])]
            assert shown == [log[number]] * cfg["B"], f"call {number}"
            position = cache.frame + offsets[chunk]
            if relative:  # among what is seen, in order of time
                position = slots.rank(slots.keep(cache, seen))
            position = position.astype(jnp.float32) * cfg["t_scale"]
            own = jnp.take_along_axis(position, taken, 1)
            x, t = jnp.asarray(channel_last(x)), jnp.asarray(t)
            inputs = dit, cache, taken, seen, own, x, t, text, position if relative else None
            v, cache = streams.call(*inputs)
            np.testing.assert_allclose(v, channel_last(flow), atol=ATOL, err_msg=f"call {number}")
            np.testing.assert_allclose(Flow(5.0).to_x0(v, x, t), channel_last(x0), atol=ATOL)
    _check_block0(case, cache, dit if relative else None)


def _check_block0(case, cache, raw):
    """The first block's keys and values of every frame that we hold. raw: the model, where
    positions are relative: the reference keeps keys as they come.
    """
    frames = case["out/slot_frame"].reshape(-1, streams.TOKENS)[:, 0].tolist()
    for row in range(cache.frame.shape[0]):
        for name, ours in (("k", cache.k), ("v", cache.v)):
            theirs = case[f"out/{name}_block0"][row].reshape(len(frames), streams.TOKENS, 2, 32)
            theirs = streams.in_space(raw.cfg, theirs) if raw and name == "k" else theirs
            for frame, value in streams.by_frame(cache, ours, row).items():
                np.testing.assert_allclose(value[0], theirs[frames.index(frame)], atol=ATOL)


# Pins that come late or are lost: the first frames of the shot that the reference's cache keeps,
# and what we attend where we differ. Ours are the sink, the shot sink and the newest frames.
LATE = {15: [0, 1, 6, 7, 10, 11], 16: [0, 1, 6, 7, 10, 11], 17: [0, 1, 6, 7, 10, 11]}
LATE |= {18: [0, 1, 6, 7, 12, 13], 21: [0, 1, 6, 7, 14, 15]}
LOST = {chunk: [0, 6, *range(2 * chunk - 4, 2 * chunk + 2)] for chunk in (6, 7, 8)}
PINS = {
    "06_kv_c2_pin_prepended": (2, LATE),
    "06_kv_c3_pin_lost": (0, {n: LOST[n // 3] for n in range(18, 27)}),
    "06_kv_e3_relative_pin": (2, LATE),
}


@pytest.mark.parametrize("name", PINS)
def test_every_call_with_the_pin_of_the_reference(golden, facts, name):
    """Attending what the reference attends, our calls are its calls."""
    case, cfg = golden("longlive2", name), facts("longlive2", name)["config"]
    stream = layout(cfg)
    stream = dataclasses.replace(stream, window=cfg["cache_frames"], shot_sink=PINS[name][0])

    def visible(number, cache):
        return (cache.frame[:, :, None] == jnp.asarray(attended(name)[number])).any(2)

    play(name, case, cfg, stream, visible)


@pytest.mark.parametrize("name", PINS)
def test_the_pin_is_neither_late_nor_lost_in_ours(facts, name):
    """The calls that attend something else under our rule, and what: the window is full from a
    chunk's first call on, all sinks included.
    """
    cfg, log = facts("longlive2", name)["config"], attended(name)
    stream, ours = layout(cfg), {}
    sinks = dict(sink=stream.sink, shot_sink=stream.shot_sink)
    cache = slots.empty(wan.LONGLIVE2, stream, 1, streams.TOKENS)
    for chunk, (start, frames, shot, numbers) in enumerate(chunks(cfg)):
        labels = jnp.int32(start), jnp.int32(chunk), jnp.int32(shot)
        _, cache = streams.claim(cache, *labels, frames=frames, **sinks)
        (seen,) = streams.attended(cache)
        assert len(seen) == min(stream.window, start + frames)
        ours |= {n: seen for n in numbers if seen != log[n]}
    assert ours == PINS[name][1]


# Tables against lists.


@dataclasses.dataclass
class Video:
    """The frames and shots that a table of `room` slots should hold of one video, in order."""

    room: int
    stream: StreamConfig
    held: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def add(self, frames: range, shot: int):
        """Drops the oldest frames that are no sinks; the shot's sink is still that of the shot
        before.
        """
        of_shot = [f for f in self.held if f[1] == self.held[-1][1]]
        sinks = {*self.held[: self.stream.sink], *of_shot[: self.stream.shot_sink]}
        loose = [f for f in self.held if f not in sinks]
        over = loose[: max(0, len(self.held) + len(frames) - self.room)]
        self.held = [f for f in self.held if f not in over] + [(f, shot) for f in frames]

    def keep(self, frames: set[int]):
        self.held = [f for f in self.held if f[0] in frames]


# Any global and shot sink, but of few sums: each sum is a shape to compile.
LAYOUTS = [
    StreamConfig(chunk, 7, sink, both - sink)
    for both, chunk in itertools.product((0, 3, 5), (1, 2, 3))
    for sink in range(both + 1)
    if chunk + both <= 7
]


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_tables_hold_what_lists_hold(data):
    """Two videos with cuts and resets of their own; the first chunk may be of another length.

    A reset leaves nothing, or the global sink and the newest chunk. Frames stay in their slots. The
    table of latents has every frame of the cache and the last `window` ones since the reset.
    """
    stream = data.draw(st.sampled_from(LAYOUTS), "stream")
    first = data.draw(st.sampled_from([1, stream.chunk]), "first")
    event = st.sampled_from(["", "", "", "cut", "cut", "forget", "clean"])
    events = data.draw(st.lists(st.tuples(event, event), max_size=12), "events")
    rooms = stream.window, slots.empty_held(stream, 1, (1, 1, 1)).frame.shape[1]
    tables = [blank(room) for room in rooms]
    models = [[Video(room, stream) for _ in range(2)] for room in rooms]
    shots, since, end, placed = np.zeros(2, np.int32), [0, 0], 0, [[{}, {}], [{}, {}]]
    for chunk, now in enumerate([("", ""), *events]):
        shots = shots + np.array([event == "cut" for event in now], np.int32)
        new = range(end, end := end + (stream.chunk if chunk else first))
        kept = []
        for row, event in enumerate(now):
            for model in models:
                model[row].add(new, int(shots[row]))
            sinks = {f for f, _ in models[0][row].held[: stream.sink]}
            kept.append({"forget": set(), "clean": sinks | {*new}}.get(event, {*range(end)}))
            since[row] = end if event in ("forget", "clean") else since[row]
            for model in models:
                model[row].keep(kept[row])
        tables = [advance(table, stream, new, shots, kept) for table in tables]
        for row in range(2):
            held = [contents(table, row) for table in tables]
            for i, found in enumerate(held):
                assert sorted(found) == [f for f, _ in models[i][row].held]
                old = placed[i][row]
                assert all(old[f] == slot for f, slot in found.items() if f in old), "moved"
                placed[i][row] = found
            recent = range(max(since[row], end - stream.window), end)
            assert held[1].keys() >= held[0].keys() | {*recent}


def blank(room: int) -> slots.Held:
    """A table of two videos."""
    labels = jnp.full((2, room), slots.EMPTY, jnp.int32)
    return slots.Held(labels, labels, labels, jnp.zeros((2, room, 1, 1, 1)))


def advance(table, stream, frames, shots, kept):
    """A chunk written into the table, and only the frames `kept` (row by row) left there."""
    taken = np.asarray(slots.choose(table, len(frames), stream.sink, stream.shot_sink))
    frame, shot = np.array(table.frame), np.array(table.shot)
    np.put_along_axis(frame, taken, np.array(frames, np.int32)[None], 1)
    np.put_along_axis(shot, taken, shots[:, None], 1)
    which = [np.isin(row, list(k)) for row, k in zip(frame, kept, strict=True)]
    table = dataclasses.replace(table, frame=jnp.asarray(frame), shot=jnp.asarray(shot))
    return slots.keep(table, jnp.asarray(which))


def contents(table, row) -> dict[int, int]:
    """Frame -> slot."""
    return {f: slot for slot, f in enumerate(np.asarray(table.frame[row]).tolist()) if f >= 0}


# Recaching.

STREAM = StreamConfig(chunk=2, window=7, sink=2, shot_sink=1)


@functools.cache
def two_videos():
    """Two videos of nine chunks, cut before the fifth, and a new prompt for each."""
    dit, rng = wan.longlive2("gen"), np.random.default_rng(7)
    prompts = rng.normal(size=(2, 2, 12, 24)).astype(np.float32)
    old, new = (streams.text(dit, jnp.asarray(prompt)) for prompt in prompts)
    video = streams.begin(dit, STREAM, SamplerConfig("euler", 1, 5.0), batch=2)
    for chunk in range(9):
        video = dataclasses.replace(video, shot=video.shot + int(chunk == 4))
        x = jnp.asarray(rng.normal(size=(2, STREAM.chunk, *streams.GRID, 4)), jnp.float32)
        video = streams.absorb(dit, video, old, x, stream=STREAM)
    return video, new


def unchanged(one, two, row) -> set[int]:
    """Frames in both caches whose keys and values are the same, to the bit."""
    x, y = (
        [streams.by_frame(v.cache, part, row) for part in (v.cache.k, v.cache.v)]
        for v in (one, two)
    )
    frames = x[0].keys() & y[0].keys()
    return {f for f in frames if all(map(np.array_equal, *([p[f] for p in v] for v in (x, y))))}


@pytest.mark.parametrize("sinks", Recache.SINKS)
def test_recache_changes_what_it_says(sinks):
    """Every key and value of the video that is re-read, but of sinks that are kept; "window" takes
    the newest frames instead. The other video stays as it is.
    """
    (video, text), which, how = two_videos(), jnp.array([True, False]), Recache(sinks=sinks)
    again = streams.recache(wan.longlive2("gen"), video, text, which, stream=STREAM, how=how)
    held = [0, 1, 8, 14, 15, 16, 17]
    assert streams.attended(video.cache) == [held] * 2
    assert streams.attended(again.cache) == [[*range(11, 18)] if sinks == "window" else held, held]
    same = [unchanged(again, video, row) for row in range(2)]
    assert same == [{0, 1, 8} if sinks == "keep" else set(), {*held}]
    frame = np.asarray(again.cache.frame)
    np.testing.assert_array_equal(again.cache.chunk, frame // STREAM.chunk)
    np.testing.assert_array_equal(again.cache.shot, frame >= 8)
    assert contents(again.cache, 1) == contents(video.cache, 1)
    assert contents(again.held, 1) == contents(video.held, 1)
    kept = contents(again.held, 0).keys()
    assert kept >= {*range(11, 18)} and kept.isdisjoint({0, 1, 8}) == (sinks == "window")


def passes(dit, cache, latents, text, written):
    """One clean pass for each chunk of a single video, oldest first: it sees what is in the cache
    up to itself, and writes what `written` says of its frames.
    """
    frame, chunk = (np.asarray(x[0]) for x in (cache.frame, cache.chunk))
    for number in sorted({*chunk[frame >= 0].tolist()}):
        own = np.flatnonzero((chunk == number) & (frame >= 0))
        if not written[own].any():
            continue
        assert written[own].all()  # no chunk of these videos is written in part
        visible = jnp.asarray((frame >= 0) & (chunk <= number))[None]
        position = cache.frame + STREAM.shot_offset * cache.shot
        position = jnp.take(position, own, axis=1).astype(jnp.float32)
        taken, x = jnp.asarray(own, jnp.int32)[None], jnp.take(latents, own, axis=1)
        zero = jnp.zeros((1, 1))
        _, cache = streams.call(dit, cache, taken, visible, position, x, zero, text)
    return cache


def alone(video, row):
    """A row of a rollout as a rollout of its own."""
    cut = lambda x: x[row : row + 1]  # noqa: E731
    of_layers = dict(k=video.cache.k[:, row : row + 1], v=video.cache.v[:, row : row + 1])
    labels = {name: cut(getattr(video.cache, name)) for name in ("frame", "chunk", "shot")}
    names = ("frame", "chunk", "shot", "key")
    return dataclasses.replace(
        video,
        cache=dataclasses.replace(video.cache, **labels, **of_layers),
        held=jax.tree.map(cut, video.held),
        **{name: cut(getattr(video, name)) for name in names},
    )


@pytest.mark.parametrize("sinks", Recache.SINKS)
def test_a_recache_is_a_clean_pass_of_each_chunk_in_turn(sinks):
    """What the default form leaves is what the chunks would leave if they came again, one after the
    other, over an empty cache: each attends itself and those before it. Sinks that are kept, those
    of the shot included, are attended as the old prompt left them.
    """
    both, text = two_videos()
    dit, video, text = wan.longlive2("gen"), alone(both, 0), jax.tree.map(lambda x: x[:, :1], text)
    which, how = jnp.ones(1, bool), Recache(sinks=sinks)
    again = streams.recache(dit, video, text, which, stream=STREAM, how=how).cache
    frame = np.asarray(again.frame[0])
    old = (
        video.cache if sinks == "keep" else dataclasses.replace(again, k=again.k * 0, v=again.v * 0)
    )
    kept = np.isin(frame, [0, 1, 8]) & (sinks == "keep")
    expected = passes(dit, old, slots.latents_of(video.held, again.frame), text, ~kept)
    for ours, theirs, before in zip(
        (again.k, again.v), (expected.k, expected.v), (video.cache.k, video.cache.v), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
        if sinks != "window":  # the same frames, most of them under another prompt
            moved = np.abs(np.asarray(ours - before)).max((0, 1, 3, 4, 5))
            np.testing.assert_array_equal(moved > 1e-4, ~kept)
