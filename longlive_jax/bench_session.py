"""What a session costs: latencies, memory, company; `longlive bench --suite session`."""

from __future__ import annotations

import dataclasses
import gc
import pathlib
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from longlive_jax import interrupts, report, saved, timeline
from longlive_jax.batch import Batch
from longlive_jax.bench import PROMPTS, CompileClock
from longlive_jax.config import Recache
from longlive_jax.errors import InputError
from longlive_jax.session import Session

EARLY_S = 5  # second of a video at which its memory is looked at first; then again at its end
ENDS = 20  # chunks at the start and at the end of a video that are compared

# What may become of the memory at a switch: the mode, and how it is re-read.
WAYS: dict[str, tuple[str, Recache | None]] = {
    f"recache {form} {sinks}": ("recache", Recache(form, sinks))
    for form in Recache.FORMS
    for sinks in Recache.SINKS
} | {"keep": ("keep", None), "reset": ("reset", None)}


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured in each repeat."""

    trials: int = 5  # of each switch
    sizes: tuple[int, ...] = (1, 2, 4, 8)  # sessions side by side
    rounds: int = 10  # chunks of each of them


@dataclasses.dataclass(frozen=True)
class Memory:
    """What is held at one point of a video."""

    second: float
    process_bytes: int
    live_bytes: int  # of arrays on devices


@dataclasses.dataclass(frozen=True)
class Played:
    """One video without lookahead; all times are from asking to frames on the host."""

    first_s: float  # from asking for the session
    chunks_s: tuple[float, ...]  # of every other chunk
    early: Memory
    late: Memory


@dataclasses.dataclass(frozen=True)
class Trial:
    """One switch in seconds, and at the same place a chunk without one."""

    frames_s: float  # from the call of `switch` to the first changed frames on the host
    state_s: float  # from the call to the new state: the text is encoded, the memory re-read
    chunk_s: float


@dataclasses.dataclass(frozen=True)
class SwitchCost:
    """Medians of trials, the last of the ratios state_s / chunk_s within each."""

    frames_s: float
    state_s: float
    chunk_s: float
    state_per_chunk: float


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Frames a second of some sessions together: in one batch, one after the other, the ratio."""

    batch_fps: float
    in_turn_fps: float
    ratio: float


@dataclasses.dataclass(frozen=True)
class Kept:
    """A session that goes to disk and comes back to a model that is loaded."""

    save_s: float
    restore_s: float
    bytes: int


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Everything once."""

    played: Played
    trials: dict[str, list[Trial]]
    together: dict[int, Throughput]
    kept: Kept


@dataclasses.dataclass(frozen=True)
class SessionReport(report.Head):
    """Medians over repeats. All of it is done once before it is measured: compilation is in no
    number but `compile_s`, and `compiled_while_measuring` says that there was none.
    """

    fps: int  # at which the video plays
    seconds: float  # of each measured video
    repeats: int
    time_to_first_chunk_s: float  # from asking for a session to its first frames on the host
    chunk_latency_p50_s: float  # lookahead 0; of all chunks of all repeats
    chunk_latency_p95_s: float
    first_chunks_p50_s: float  # of a video's first chunks, and of as many at its end
    last_chunks_p50_s: float
    memory: dict[str, Memory]
    switches: dict[str, SwitchCost]
    batches: dict[int, Throughput]
    save_s: float
    restore_s: float
    saved_bytes: int
    peak_memory_bytes: int  # of the device; on CPUs of the process
    compile_s: float
    compiled_while_measuring: int
    steps: int


def timed(act: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    interrupts.stop.check()
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def resident_memory() -> int:
    """Bytes of this process in memory now; where the system does not say, at their peak."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text("utf-8").split()[1])
    except OSError:
        return report.peak_memory()
    return pages * resource.getpagesize()


def memory_at(second: float) -> Memory:
    """What is held now, after what nobody can reach any more is gone."""
    gc.collect()
    return Memory(second, resident_memory(), sum(x.nbytes for x in jax.live_arrays()))


def play(model: Any, *, seconds: float, seed: int, steps: int | None) -> tuple[Session, Played]:
    """Makes a video chunk by chunk, as somebody does who may change the prompt after each."""
    config = model.config
    early, chunks = (timeline.chunk_count(config, length) for length in (EARLY_S, seconds))
    start = time.perf_counter()
    session = model.session(PROMPTS[0], seed=seed, steps=steps)
    session.next_chunk()
    first = time.perf_counter() - start

    def more(count: int) -> tuple[list[float], Memory]:
        times = [timed(session.next_chunk) for _ in range(count)]
        return times, memory_at(session.frame / config.fps)

    (sooner, before), (later, after) = more(early - 1), more(chunks - early)
    return session, Played(first, (*sooner, *later), before, after)


def try_switches(session: Session, count: int) -> dict[str, list[Trial]]:
    """Every way of switching `count` times, one way after the other, each from where the session
    is.
    """
    trials: dict[str, list[Trial]] = {name: [] for name in WAYS}
    for _ in range(count):
        for name, (mode, how) in WAYS.items():
            trials[name].append(_trial(session, mode, how))
    return trials


def _trial(session: Session, mode: str, how: Recache | None) -> Trial:
    def settle(fork: Session) -> Session:
        jax.block_until_ready(fork.state)
        return fork

    def seconds(*acts: Callable[[Session], Any]) -> float:
        fork = settle(session.fork())
        return timed(lambda: [act(fork) for act in acts])

    def switch(fork: Session) -> None:
        fork.switch(PROMPTS[1], mode, how=how)

    chunk_s = seconds(Session.next_chunk)
    return Trial(seconds(switch, Session.next_chunk), seconds(switch, settle), chunk_s)


def side_by_side(model: Any, size: int, *, rounds: int, seed: int, steps: int | None) -> Throughput:
    """The same sessions in a batch and in turn, a chunk of each at a time."""
    sessions = [
        model.session(PROMPTS[row % len(PROMPTS)], seed=seed + row, steps=steps)
        for row in range(size)
    ]
    batch = Batch(model, size, steps=steps)
    for session in sessions:
        session.next_chunk()
        batch.add(session.fork())
    together, in_turn = 0.0, 0.0
    for _ in range(rounds):
        together += timed(batch.next_chunks)
        in_turn += timed(lambda: [session.next_chunk() for session in sessions])
    frames = rounds * size * model.config.frames_per_chunk
    return Throughput(frames / together, frames / in_turn, in_turn / together)


def save_and_restore(session: Session) -> Kept:
    """The session goes to a folder of its own, which is removed again."""
    with tempfile.TemporaryDirectory() as parent:
        folder = pathlib.Path(parent) / "session"
        save_s = timed(lambda: session.save(folder))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

        def restore() -> None:
            jax.block_until_ready(saved.restore(folder, model=session.model).state)

        return Kept(save_s, timed(restore), size)


def once(model: Any, *, seconds: float, effort: Effort, seed: int, steps: int | None) -> Repeat:
    """Measures everything once, on the session of one video."""
    session, played = play(model, seconds=seconds, seed=seed, steps=steps)
    choices = dict(rounds=effort.rounds, seed=seed, steps=steps)
    together = {size: side_by_side(model, size, **choices) for size in effort.sizes}
    trials = try_switches(session, effort.trials)
    return Repeat(played, trials, together, save_and_restore(session))


def cost(trials: Sequence[Trial]) -> SwitchCost:
    """Medians of the trials of one way of switching."""
    rows = [(t.frames_s, t.state_s, t.chunk_s, t.state_s / t.chunk_s) for t in trials]
    return SwitchCost(*map(statistics.median, zip(*rows, strict=True)))


def medians(values: Sequence[Any]) -> Any:
    """One of the values' kind, field by field the median; integers stay integers."""
    rows = [dataclasses.asdict(value) for value in values]
    middle = {name: statistics.median([row[name] for row in rows]) for name in rows[0]}
    kinds = {name: type(value) for name, value in rows[0].items()}
    return type(values[0])(**{name: kinds[name](value) for name, value in middle.items()})


def summarise(repeats: Sequence[Repeat], **facts: Any) -> SessionReport:
    """The report of all repeats; `facts` are the fields that are not measured in them."""
    videos = [repeat.played for repeat in repeats]
    chunks = [seconds for video in videos for seconds in video.chunks_s]
    ends = min(ENDS, len(videos[0].chunks_s) // 2)
    kept = medians([repeat.kept for repeat in repeats])
    trials = {name: [t for repeat in repeats for t in repeat.trials[name]] for name in WAYS}
    sizes = repeats[0].together
    return SessionReport(
        repeats=len(repeats),
        time_to_first_chunk_s=statistics.median(video.first_s for video in videos),
        chunk_latency_p50_s=float(np.percentile(chunks, 50)),
        chunk_latency_p95_s=float(np.percentile(chunks, 95)),
        first_chunks_p50_s=statistics.median(s for v in videos for s in v.chunks_s[:ends]),
        last_chunks_p50_s=statistics.median(s for v in videos for s in v.chunks_s[-ends:]),
        memory={
            "early": medians([video.early for video in videos]),
            "late": medians([video.late for video in videos]),
        },
        switches={name: cost(tried) for name, tried in trials.items()},
        batches={n: medians([repeat.together[n] for repeat in repeats]) for n in sizes},
        save_s=kept.save_s,
        restore_s=kept.restore_s,
        saved_bytes=kept.bytes,
        peak_memory_bytes=report.peak_memory(),
        **facts,
    )


def run(
    model: Any,
    *,
    seconds: float,
    repeat: int,
    seed: int,
    steps: int | None,
    effort: Effort | None = None,
) -> SessionReport:
    """Measures everything `repeat` times, after doing all of it once for warm-up.

    Args:
      model: What `longlive_jax.load` returns.
      seconds: Length of the measured videos; beyond `EARLY_S`.
      seed: Of the first video; the next ones count up.
      steps: Denoising steps; None is the model's own number.

    Raises:
      InputError: the videos are too short.
    """
    config, effort = model.config, effort or Effort()
    early = timeline.chunk_count(config, EARLY_S)
    if timeline.chunk_count(config, seconds) <= early:
        raise InputError(
            f"--seconds {seconds:g} is too short: memory at second {EARLY_S} is compared with"
            " memory at the end"
        )
    little = dataclasses.replace(effort, trials=1, rounds=1)
    shortest = (early + 1) * config.frames_per_chunk / config.fps
    with CompileClock() as warmup:
        once(model, seconds=shortest, effort=little, seed=seed, steps=steps)
    with CompileClock() as clock:
        repeats = [
            once(model, seconds=seconds, effort=effort, seed=seed + i, steps=steps)
            for i in range(repeat)
        ]
    return summarise(
        repeats,
        **report.head("session", model, seed),
        fps=config.fps,
        seconds=seconds,
        compile_s=warmup.seconds,
        compiled_while_measuring=clock.programs,
        steps=len(model.solver(steps).steps),
    )
