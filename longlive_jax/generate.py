"""`longlive generate`: prompts in, a video file out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column

from longlive_jax import bench, output, timeline
from longlive_jax.errors import InputError
from longlive_jax.report import Report
from longlive_jax.request import Request
from longlive_jax.video import VideoWriter


def check_timeline(request: Request, model: Any) -> None:
    """Raises `InputError` for a change of prompt that no chunk is left to show."""
    last = timeline.last_start(model.config, request.seconds)
    for event in request.events:
        if event.time_s > last:
            raise InputError(
                f'"{event.prompt}" at {event.time_s:g} s comes too late:'
                f" the last chunk begins at {last:.4g} s"
            )


def run(request: Request, load: Callable[[str], Any]) -> None:
    """Makes the video. On Ctrl-C what is there becomes the video, and `KeyboardInterrupt` goes on.

    Args:
      request: Already checked.
      load: Makes a model of its name.

    Raises:
      InputError: the model cannot do it, or there is no room for the results.
    """
    console = Console(stderr=True, highlight=False)
    with bench.CompileClock() as clock:
        with console.status("loading the model"):
            model = load(request.model)
        check_timeline(request, model)
        stream = model.stream(
            request.prompt,
            seconds=request.seconds,
            seed=request.seed,
            steps=request.steps,
            events=request.events,
        )
        chunks = timeline.chunk_count(model.config, request.seconds)
        watch = bench.Stopwatch()
        writer = VideoWriter(request.output, model.config.fps)
        try:
            with writer:
                for _ in _shown(watch, watch.follow(stream, writer.write), chunks, console):
                    pass
        finally:
            watch.close()
            if writer.complete:
                summary = bench.summarise(
                    [watch],
                    bench.own_warmup(len(watch.marks)),
                    fps=model.config.fps,
                    compile_s=clock.seconds,
                    seed=request.seed,
                    steps=request.steps or model.config.sampler.steps,
                )
                _say(summary, timeline.frame_count(model.config, request.seconds), request, console)
                output.write_report(request.json, summary.to_json())


def _say(summary: Report, wanted: int, request: Request, console: Console) -> None:
    early = "stopped early, " if summary.frames < wanted else ""
    words = (
        f"{request.output}: {early}{summary.frames} frames of {summary.width}x{summary.height},"
        f" {summary.frames / summary.fps:.1f} s of video;"
        f" {summary.end_to_end_fps:.1f} FPS end to end after warm-up"
    )
    console.print(words, markup=False, soft_wrap=True)


def _shown(
    watch: bench.Stopwatch, stream: Iterator[Any], chunks: int, console: Console
) -> Iterator[Any]:
    """Passes chunks on under a progress bar: which chunk, how fast, the prompt in force."""
    one_line = Column(no_wrap=True, overflow="ellipsis")
    words = TextColumn("{task.description}", markup=False, table_column=one_line)
    columns = (SpinnerColumn(), BarColumn(), words)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("compiling (kept on disk for the next start)", total=chunks)
        for number, chunk in enumerate(stream, 1):
            mark = watch.marks[-1]
            speed = mark.frames / (mark.written - mark.asked)
            state = f"chunk {number}/{chunks}  {speed:.1f} FPS  {chunk.prompt}"
            progress.update(task, advance=1, description=state)
            yield chunk
