"""Taking the time of a video that is being made; `longlive bench`."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from longlive_jax import bench_ceiling, report, timeline
from longlive_jax.events import CUT_PREFIX, Event

PROMPTS = (
    "a red circle moves left over a black background",
    "a blue square bounces over a grey background",
)
WARMUP_CHUNKS = 2  # nothing is compiled after the second chunk
CHANGES = ("switch", "cut", "none")  # what may happen in the middle of a measured video


@dataclasses.dataclass(frozen=True)
class Mark:
    """One chunk: how many frames, and the clock when it was asked for, there, and handed to the
    writer.
    """

    frames: int
    denoise_s: float
    asked: float
    ready: float
    written: float


class Stopwatch:
    """Follows one video from the first request until its file is closed.

    session: whose chunks they are; its `last` says what each was. events: the changes that it was
    asked for.
    """

    def __init__(self, session: Any, events: Sequence[Event] = ()) -> None:
        self.session = session
        self.marks: list[Mark] = []
        self.switches: list[report.Switch] = []
        self.size = (0, 0)
        self.closed = 0.0
        self._start = session.frame
        self._asked = sorted(events, key=lambda event: event.time_s)

    def follow(
        self, stream: Iterable[np.ndarray], write: Callable[[np.ndarray], None]
    ) -> Iterator[np.ndarray]:
        """Passes chunks on, each already written, and notes the times."""
        asked = time.perf_counter()
        for frames in stream:
            ready = time.perf_counter()
            try:
                write(frames)
            finally:  # Ctrl-C arrives at the end of a write: that chunk is in the file
                written = time.perf_counter()
                last = self.session.last
                self.marks.append(Mark(len(frames), last.denoise_s, asked, ready, written))
                self.size = frames.shape[1:3]
                self.switches += [self._switch(receipt) for receipt in last.changes]
            yield frames
            asked = time.perf_counter()

    def _switch(self, receipt: Any) -> report.Switch:
        applied = (receipt.frame - self._start) / self.session.model.config.fps
        waiting = self._asked and self._asked[0].prompt.strip().removeprefix(CUT_PREFIX)
        # A resumed session may begin with a change that was asked for before it was saved.
        asked = self._asked.pop(0).time_s if waiting == receipt.prompt else applied
        return report.Switch(receipt.prompt, float(asked), applied)

    def close(self) -> None:
        """Call it when the file is complete: an encoder holds frames back until then."""
        self.closed = time.perf_counter()

    def flops(self, warmup: int) -> float:
        """Of denoising the chunks after the warm-up, each with as much memory as it had."""
        config, steps = self.session.model.config, len(self.session.solver.steps)
        first = round(self._start / config.frames_per_chunk)
        return sum(
            bench_ceiling.chunk_flops(config, steps, first + number)
            for number, mark in enumerate(self.marks)
            if number >= warmup and mark.denoise_s  # what a saved session had left takes no time
        )

    def seconds(self, warmup: int) -> float:
        """From the end of the warm-up chunks to the file being closed."""
        start = self.marks[warmup - 1].written if warmup else self.marks[0].asked
        return self.closed - start


class CompileClock:
    """Adds up the time that XLA compiles (or loads from the cache) inside the context."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.programs = 0

    def __enter__(self) -> CompileClock:
        jax.monitoring.register_event_duration_secs_listener(self._add)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._add)

    def _add(self, event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += seconds
            self.programs += 1


def own_warmup(chunks: int) -> int:
    """How many of a video's own chunks are warm-up: at least one chunk is left to measure."""
    return max(0, min(WARMUP_CHUNKS, chunks - 1))


def summarise(
    videos: Sequence[Stopwatch],
    warmup: int,
    *,
    compile_s: float,
    seed: int,
    alone: Sequence[Stopwatch] = (),
) -> report.Report:
    """The report of videos of the same length, leaving out the first `warmup` chunks of each.

    alone: videos in which nothing is decoded while a chunk is denoised: by these, if there are any,
    the transformer is judged.
    """
    marks = [mark for video in videos for mark in video.marks[warmup:]]
    frames = sum(mark.frames for mark in marks)
    latencies = [mark.ready - mark.asked for mark in marks]
    first = [video.marks[0].ready - video.marks[0].asked for video in videos]
    height, width = videos[0].size
    session = videos[0].session
    config, steps = session.model.config, len(session.solver.steps)
    denoised = [mark for video in alone or videos for mark in video.marks[warmup:]]
    denoise_s = max(sum(mark.denoise_s for mark in denoised), 1e-9)
    denoise_fps = sum(mark.frames for mark in denoised) / denoise_s
    done = sum(video.flops(warmup) for video in alone or videos)
    peak = bench_ceiling.peak()
    return report.Report(
        **report.head("generate", session.model, seed),
        frames=sum(mark.frames for mark in videos[0].marks),
        width=width,
        height=height,
        fps=config.fps,
        denoise_fps=denoise_fps,
        end_to_end_fps=frames / sum(video.seconds(warmup) for video in videos),
        time_to_first_chunk_s=float(np.median(first)),
        chunk_latency_p50_s=float(np.percentile(latencies, 50)),
        chunk_latency_p95_s=float(np.percentile(latencies, 95)),
        switches=tuple(videos[0].switches),
        peak_memory_bytes=report.peak_memory(),
        compile_s=compile_s,
        steps=steps,
        clean_pass=config.stream.clean_pass,
        warmup_chunks=warmup,
        window=config.stream.window,
        chunk_flops=bench_ceiling.chunk_flops(config, steps),
        ceiling_fps=denoise_fps * denoise_s * peak / done if peak else None,
        of_ceiling=done / denoise_s / peak if peak else None,
    )


def run(
    model: Any,
    *,
    seconds: float,
    repeat: int,
    seed: int,
    steps: int | None,
    change: str = "switch",
    writer: Callable[[pathlib.Path, int], Any] | None = None,
) -> report.Report:
    """Makes a short video for warm-up and `repeat` measured ones, each with a change half-way; and
    as many without, chunk by chunk, by which the transformer is judged alone.

    Args:
      model: What `longlive_jax.load` returns.
      seconds: Length of the measured videos; with a change at least two chunks.
      repeat: How many videos are measured.
      seed: Of the first video; the next ones count up.
      steps: Denoising steps; None is the model's own number.
      change: One of `CHANGES`.
      writer: What takes the frames of a video, of a path and the frames per second: a context with
        `write(frames)`. None is `video.BackgroundWriter`, an MP4, for which PyAV is needed.
    """
    if writer is None:
        from longlive_jax.video import BackgroundWriter as writer  # imports PyAV
    chunk_s = model.config.frames_per_chunk / model.config.fps

    def changes(seconds: float) -> tuple[Event, ...]:
        if change == "none":
            return ()
        return (Event(timeline.middle(model.config, seconds), change, PROMPTS[1]),)

    def video(
        number: int, seconds: float, events: Sequence[Event], lookahead: int = 1
    ) -> Stopwatch:
        modes = {event.mode for event in events if event.kind == "switch"}
        session = model.session(PROMPTS[0], seed=seed + number, steps=steps).prepare(*modes)
        watch = Stopwatch(session, events)
        stream = session.stream(seconds, events=events, lookahead=lookahead)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "bench.mp4"
            with writer(path, model.config.fps) as file:
                for _ in watch.follow(stream, file.write):
                    pass
            watch.close()
        return watch

    with CompileClock() as clock:
        short = min(seconds, (2 * WARMUP_CHUNKS) * chunk_s)
        warmup = video(0, short, changes(short))
        measured = [video(number, seconds, changes(seconds)) for number in range(repeat)]
        alone = [video(number, seconds, (), lookahead=0) for number in range(repeat)]
    summary = summarise(measured, 0, compile_s=clock.seconds, seed=seed, alone=alone)
    return dataclasses.replace(summary, warmup_chunks=len(warmup.marks))
