"""`longlive data check`: what is wrong in a folder of training videos, where, and what mends it.

Files are opened, their frames counted, and the first and last of them decoded; nothing is written.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator

import numpy as np

from longlive_jax import interrupts, listing, output
from longlive_jax.clips import Footage, footage
from longlive_jax.config import ModelConfig
from longlive_jax.data import folder, montage
from longlive_jax.data.folder import Sample
from longlive_jax.errors import InputError
from longlive_jax.plan import PRESETS
from longlive_jax.version import __version__

WARNING, FAULT = "warning", "fault"  # with a fault, its sample cannot be used
CROPPED = 0.25  # of a picture; a larger part is worth a warning
UNEVEN = 1.5  # longest time between two frames over the usual one, from which on a rate varies
FASTEST = 120  # frames per second; beyond it a rate is more likely written down wrongly
SHOWN = 50  # kinds of problems on the screen
WRITE = 'write {"caption": "..."} into it'


@dataclasses.dataclass(frozen=True)
class Problem:
    """One finding: how bad, where (in the data set), in words, and what mends it."""

    state: str  # WARNING or FAULT
    sample: str
    file: str
    found: str
    mend: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What a data set holds, and what is wrong with it."""

    folder: str
    model: str  # for which it was checked
    samples: int
    usable: int
    clips: int  # that have a caption and can be read
    seconds: float  # of them
    problems: tuple[Problem, ...]

    @property
    def hours(self) -> float:
        return self.seconds / 3600

    def to_json(self) -> str:
        body = {"version": __version__, **dataclasses.asdict(self), "hours": self.hours}
        return json.dumps(body, indent=2) + "\n"


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A sample after it was looked at."""

    seconds: tuple[float, ...]  # of every clip that has a caption and can be read
    problems: tuple[Problem, ...]

    @property
    def usable(self) -> bool:
        return all(problem.state != FAULT for problem in self.problems)


def check(root: pathlib.Path, config: ModelConfig = PRESETS["wan22_5b"]) -> Report:
    """Looks at every sample of a data set; config: of the model that is to be trained.

    Raises:
      InputError: it is no data set at all.
    """
    samples = folder.samples(root)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        seen = []
        try:
            for one in pool.map(lambda sample: _look(root, sample, config), samples):
                interrupts.stop.check()
                seen.append(one)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    problems = itertools.chain(*(one.problems for one in seen), _orphans(root, samples))
    seconds = [s for one in seen for s in one.seconds]
    return Report(
        folder=str(root),
        model=config.name,
        samples=len(samples),
        usable=sum(one.usable for one in seen),
        clips=len(seconds),
        seconds=sum(seconds),
        problems=tuple(problems),
    )


def _look(root: pathlib.Path, sample: Sample, config: ModelConfig) -> _Seen:
    def problem(state: str, file: pathlib.Path, found: str, mend: str) -> Problem:
        # What was raised names the whole path, which is the column beside it.
        said = found.removeprefix(f"{file} ").removeprefix(f"{file}, ")
        return Problem(state, sample.name, str(file.relative_to(root)), said, mend)

    captioned, found = _captions(sample)
    problems = [problem(*words) for words in (*found, *_names(sample), *_written(sample))]
    lengths = montage.for_model(config, chunks=2).lengths  # of a first chunk, and of any other
    seconds, usable = [], 0
    for number, video in enumerate(captioned):
        chunk = lengths[min(number, 1)]
        try:
            shot, clip = footage(video), folder.clip(video, "")
            folder.read(video, sorted({0, clip.frames - 1}), config.height, config.width)
        except InputError as error:
            mend = "encode it anew, or remove it and its caption"
            problems.append(problem(FAULT, video, str(error), mend))
            continue
        fits = montage.holds(clip, 0, chunk, config.fps)
        odd = [*_oddities(shot, config), *([] if fits else [_short(shot, chunk / config.fps)])]
        problems += [problem(WARNING, video, *words) for words in odd]
        seconds.append(shot.seconds)
        usable += fits
    if not usable and all(problem.state != FAULT for problem in problems):
        place = root / "video" / sample.name
        lacks = "has no clip with a caption that is as long as a chunk"
        problems.append(problem(FAULT, place, lacks, "put longer clips into it, or remove it"))
    return _Seen(tuple(seconds), tuple(problems))


Found = tuple[str, pathlib.Path, str, str]


def _captions(sample: Sample) -> tuple[list[pathlib.Path], list[Found]]:
    """The videos of which something is said, and what is wrong with the captions of others."""
    captioned, found = [], []
    for video in sample.videos:
        file = sample.caption_file(video)
        try:
            said = folder.caption(file)
        except InputError as error:
            found.append((FAULT, file, str(error), WRITE))
            continue
        captioned += [video] if said else []
        if not said:
            state = "is empty" if file.exists() else "is missing"
            found.append((WARNING, file, f"{state}: {video.name} is left out", WRITE))
    return captioned, found


def _names(sample: Sample) -> Iterator[Found]:
    """What is wrong with the names of a sample's videos."""
    for stem, count in collections.Counter(video.stem for video in sample.videos).items():
        if count > 1:
            file = sample.captions / f"{stem}.json"
            yield WARNING, file, f"is that of {count} videos", "give each a number of its own"
    unnumbered = [video for video in sample.videos if not video.stem.isdecimal()]
    if len(unnumbered) < len(sample.videos):
        for video in unnumbered:
            yield WARNING, video, "has no number: it comes after those that have", "rename it"


def _written(sample: Sample) -> Iterator[Found]:
    """What is wrong with the folder of a sample's captions."""
    stems = {video.stem for video in sample.videos} | {"global"}
    there = sample.captions.is_dir()
    files = listing.shown(sample.captions, "*.json") if there else []
    for file in files:
        if file.stem not in stems:
            yield WARNING, file, "belongs to no video", "add the video, or remove it"
    durations = sample.captions / "shot_durations.txt"
    if durations.exists():
        with folder.reading(durations):
            words = durations.read_text("utf-8-sig", "replace").replace(",", " ").split()
        count = sum(file.stem != "global" for file in files)
        if not all(word.isdecimal() and int(word) for word in words):
            found = f"is no list of whole numbers: {' '.join(words)[:40]}"
            yield WARNING, durations, found, "write the chunks of each shot, as in 6, 4, 6"
        elif len(words) != count:
            found = f"has {len(words)} numbers for {count} captions"
            yield WARNING, durations, found, "write one number for each caption"


def _oddities(shot: Footage, config: ModelConfig) -> Iterator[tuple[str, str]]:
    """What is unusual about a clip that can be read, and what to do about it."""
    fps = float(shot.fps)
    if fps < config.fps:
        yield f"has {fps:.4g} FPS: frames repeat at {config.fps} FPS", "take a faster recording"
    if fps > FASTEST:
        yield f"has {fps:.4g} FPS", "encode it anew at its true rate"
    steps = np.diff(shot.times)
    if len(steps) and steps.max() > UNEVEN * np.median(steps):
        found = "has frames of unequal length: they are read as if they were equal"
        yield found, f"encode it anew at a constant rate, such as {config.fps} FPS"
    scale = max(config.height / shot.height, config.width / shot.width)
    size, wanted = f"{shot.width}x{shot.height}", f"{config.width}x{config.height}"
    if scale > 1:
        yield f"is {size}, and is enlarged to {wanted}", "take a larger recording"
    kept = config.height * config.width / (shot.height * shot.width * scale**2)
    if kept < 1 - CROPPED:
        found = f"is {size}: {1 - kept:.0%} of the picture is cropped for {wanted}"
        yield found, "crop it yourself, if the middle is not what matters"


def _short(shot: Footage, chunk: float) -> tuple[str, str]:
    found = f"lasts {shot.seconds:.2f} s, less than a chunk of {chunk:.2f} s: it is passed over"
    return found, "join it with its neighbour, or remove it"


def _orphans(root: pathlib.Path, samples: list[Sample]) -> Iterator[Problem]:
    """Folders of captions that have no videos."""
    names = {sample.name for sample in samples}
    for captions in folder.folders(root / "caption"):
        if captions.name not in names:
            file, found = f"caption/{captions.name}", f"has no folder video/{captions.name}"
            yield Problem(WARNING, captions.name, file, found, "add its videos, or remove it")


def show(report: Report, to_stderr: bool) -> None:
    """Prints counts, and every kind of problem once, faults first."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=to_stderr)
    plain = dict(markup=False, highlight=False, soft_wrap=True)
    table = Table("what", "how many")
    for name in ("samples", "usable", "clips"):
        table.add_row(name, str(getattr(report, name)))
    table.add_row("hours", f"{report.hours:.2f}")
    console.print(f"{report.folder}, for {report.model}", **plain)
    console.print(table, markup=False)
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for problem in sorted(report.problems, key=lambda problem: problem.state != FAULT):
        kinds.setdefault((problem.state, problem.found, problem.mend), []).append(problem.file)
    for (state, found, mend), files in itertools.islice(kinds.items(), SHOWN):
        more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
        console.print(f"{state}: {files[0]} {found}{more}\n    {mend}", **plain)
    if len(kinds) > SHOWN:
        console.print(f"and {len(kinds) - SHOWN} other kinds: --json FILE lists all", **plain)


def run(root: pathlib.Path, json: pathlib.Path | None, preset: str = "wan22_5b") -> None:
    """Looks, and says what it found.

    Raises:
      InputError: it is no data set, or some of its samples cannot be used.
    """
    if preset not in PRESETS:
        raise InputError(f'--preset "{preset}" is not known: say {", ".join(PRESETS)}')
    output.check_report(json)
    report = check(root, PRESETS[preset])
    show(report, to_stderr=json == output.STDOUT)
    output.write_report(json, report.to_json())
    first = next((problem for problem in report.problems if problem.state == FAULT), None)
    if first:
        raise InputError(
            f"{report.samples - report.usable} of {report.samples} samples in {root} cannot be"
            f" used, the first because {first.file} {first.found}"
        )
