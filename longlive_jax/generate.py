"""`longlive generate`: prompts in, video files out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column

from longlive_jax import bench, output, timeline
from longlive_jax.errors import InputError
from longlive_jax.events import CUT_PREFIX, Event
from longlive_jax.report import Report
from longlive_jax.request import Request, reports
from longlive_jax.story import Draft, Story
from longlive_jax.video import BackgroundWriter

Load = Callable[..., Any]


def check_timeline(story: Story, model: Any) -> None:
    """Raises `InputError` for a change of prompt that no chunk is left to show."""
    last = timeline.last_start(model.config, story.seconds)
    for event in story.events:
        if event.time_s > last:
            raise InputError(
                f'"{event.prompt}" at {event.time_s:g} s comes too late:'
                f" the last chunk begins at {last:.4g} s"
            )


def run(request: Request, drafts: Sequence[Draft], load: Load) -> None:
    """Makes the videos. On Ctrl-C what is there becomes the video, and `KeyboardInterrupt` goes on.

    Args:
      request: Already checked.
      drafts: What `Request.check` made of it.
      load: Makes a model of its name.

    Raises:
      InputError: the model cannot do it, or there is no room for the results.
    """
    console = Console(stderr=True, highlight=False)
    with console.status("loading the model"):
        model, session = _loaded(request, load)
    stories = [_in_mode(d.place(model.config, request.seconds), request.mode) for d in drafts]
    for story in stories:
        check_timeline(story, model)
    count = len(stories)
    paths = request.outputs(count)
    for story, path, report in zip(stories, paths, reports(request.json, count), strict=True):
        job = dataclasses.replace(request, output=path, json=report)
        if session is None:
            with console.status("reading what the video begins with"):
                begun = _begun(job, story, model)
        else:
            begun = session
        _make(job, story, begun, console)


def _in_mode(story: Story, mode: str | None) -> Story:
    events = [dataclasses.replace(event, mode=mode or event.mode) for event in story.events]
    return dataclasses.replace(story, events=tuple(events))


def _loaded(request: Request, load: Load) -> tuple[Any, Any]:
    """The model, and the session if one is to be continued."""
    if request.resume is None:
        return load(request.model).streaming(**dict(request.stream)), None
    from longlive_jax import saved

    session = saved.restore(request.resume, load=load)
    if request.lora:
        session.adapt(request.lora)
    session.model = session.model.streaming(**dict(request.stream))
    return session.model, session


def _begun(request: Request, story: Story, model: Any) -> Any:
    seeds = (request.seed, story.seed, 0)
    return model.session(
        story.prompt,
        seed=next(seed for seed in seeds if seed is not None),
        steps=request.steps,
        image=story.image,
        video=story.video,
    )


def _make(request: Request, story: Story, session: Any, console: Console) -> None:
    """One video of one session, its report, and the session to go on from."""
    config, events = session.model.config, story.events
    told = _tell(session.notes, (), console)
    told = _tell(_notes_ahead(session.model, events), told, console)
    chunks = timeline.chunk_count(config, story.seconds)
    with bench.CompileClock() as clock:
        session.prepare(*_modes(events))
        watch = bench.Stopwatch(session, events)
        writer = BackgroundWriter(request.output, config.fps)
        stream = session.stream(story.seconds, events=events, lookahead=1)
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
                    compile_s=clock.seconds,
                    seed=session.seed,
                )
                _tell(session.notes, told, console)
                summary = dataclasses.replace(summary, notes=session.notes)
                _say(summary, timeline.frame_count(config, story.seconds), request, console)
                output.write_report(request.json, summary.to_json())
                if request.save:
                    session.save(request.save)


def _notes_ahead(model: Any, events: Sequence[Event]) -> tuple[str, ...]:
    """Return notes on the prompts of events, which are known before the video is made."""
    prompts = []
    for event in events:
        prompt = event.prompt.strip()
        cuts = event.kind == "cut" and not f"{prompt} ".startswith(CUT_PREFIX)
        prompts.append(CUT_PREFIX + prompt if cuts else prompt)
    return tuple(filter(None, map(model.prompt_note, prompts)))


def _tell(notes: Sequence[str], told: Sequence[str], console: Console) -> tuple[str, ...]:
    """Prints the notes that were not told before. Returns all that are told by now."""
    new = [note for note in dict.fromkeys(notes) if note not in told]
    for note in new:
        console.print(note, markup=False, soft_wrap=True)
    return (*told, *new)


def _modes(events: Sequence[Event]) -> set[str]:
    return {event.mode for event in events if event.kind == "switch"}


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
            prompt = watch.session.last.prompt
            state = f"chunk {number}/{chunks}  {speed:.1f} FPS  {prompt}"
            progress.update(task, advance=1, description=state)
            yield chunk
