"""Whole stories from files: our own `story.json`, and the original projects' prompt files as they
are.

A `story.json` is one video. Only "prompt" must be there; paths are beside the file:

    {
      "prompt": "a cat sits in tall grass",
      "seconds": 20,
      "seed": 0,
      "image": "cat.png",
      "events": [
        {"at": 5, "switch": "the cat stands up"},
        {"at": 8, "cut": "a dog runs along a beach"}
      ]
    }

"video": "clip.mp4" may stand in place of "image", and "1:30" or "0:01:30" in place of 90 seconds.

The others, each one or several videos:

- `.txt`: a prompt a line (`utils/dataset.py:TextDataset`).
- `.jsonl`: {"prompts": ["first", "second", ...]} a line, switched between inside the shot
  (LongLive 1.0 `interactive_inference.py`).
- A folder `caption/<sample>/*.json`, `<sample>/*.json` or one sample: a shot for each file's
  "caption" (LongLive 2.0 `utils/dataset.py:MultiTextConcatDataset`).
- A folder `images/cat.png`, `prompts/cat.txt`, or both kinds side by side: a video for each
  picture, which it begins with, and a shot for each line of its text
  (`utils/dataset.py:ImagePromptDataset`).

The last three count in latent frames and chunks, so that `read` makes drafts without a model, and
`place` puts them on the timeline of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from longlive_jax import documents, listing, timeline, times
from longlive_jax.config import ModelConfig
from longlive_jax.errors import InputError
from longlive_jax.events import Event, in_order

SECONDS = 10.0  # of a video of which nothing says how long it is
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".tif", ".tiff")
SEGMENT_S = 10.0  # between interactive prompts: six in 60 s (LongLive 1.0 table 2)


@dataclasses.dataclass(frozen=True)
class Story:
    """One video, in seconds."""

    prompt: str
    seconds: float | int | None = None  # None where the file does not say
    events: tuple[Event, ...] = ()
    seed: int | None = None
    image: Any = None  # a file; in Python whatever `Model.session` takes
    video: Any = None
    name: str = ""  # what to call its output

    def place(self, config: ModelConfig, seconds: float | int | None = None) -> Story:
        """Itself with a length: `seconds`, else what the file says, else `SECONDS`."""
        del config
        lengths = (seconds, self.seconds, SECONDS)
        return dataclasses.replace(self, seconds=next(s for s in lengths if s is not None))


@dataclasses.dataclass(frozen=True)
class Segments:
    """Prompts that follow each other inside one shot.

    frames: the latent frame that each prompt but the first begins at, or at the first chunk after
    it (`switch_frame_indices`). Empty is every `SEGMENT_S`.
    """

    prompts: tuple[str, ...]
    frames: tuple[int, ...] = ()
    name: str = ""

    def place(self, config: ModelConfig, seconds: float | int | None = None) -> Story:
        """The story of that length; None ends it `SEGMENT_S` after the last prompt began."""
        step = round(SEGMENT_S * config.fps / config.vae.time_stride)
        frames = self.frames or range(step, step * len(self.prompts), step)
        begins = [0]
        for frame in frames:  # the original code changes at most once a chunk
            begins.append(max(math.ceil(frame / config.stream.chunk), begins[-1] + 1))
        if seconds is None:
            seconds = _lasting(config, max(frames, default=0) + step)
        placed = list(zip(self.prompts, begins, strict=True))
        return _story("switch", placed, config, seconds, self.name)


@dataclasses.dataclass(frozen=True)
class Shots:
    """Captions with a cut between each two.

    chunks: how many each shot lasts; the last one takes those that are left over. Empty is an even
    split, the first shots taking the remainder. image: what the first shot begins with.
    """

    captions: tuple[str, ...]
    chunks: tuple[int, ...] = ()
    name: str = ""
    image: Any = None  # as of a `Story`

    def place(self, config: ModelConfig, seconds: float | int | None = None) -> Story:
        """The story of that length; None is all chunks, or `SECONDS` of an even split."""
        if seconds is None and self.chunks:
            seconds = _lasting(config, sum(self.chunks) * config.stream.chunk)
        seconds = SECONDS if seconds is None else seconds
        shots = len(self.captions)
        each, more = divmod(timeline.chunk_count(config, seconds), shots)
        lengths = self.chunks or [each + (shot < more) for shot in range(shots)]
        begins = itertools.accumulate(lengths, initial=0)
        placed = list(zip(self.captions[: len(lengths)], begins, strict=False))
        made = _story("cut", placed, config, seconds, self.name)
        return dataclasses.replace(made, image=self.image)


Draft = Story | Segments | Shots


def files(draft: Draft) -> list[pathlib.Path]:
    """The files of pictures and clips that a draft names."""
    named = (getattr(draft, name, None) for name in ("image", "video"))
    return [pathlib.Path(path) for path in named if isinstance(path, str | os.PathLike)]


def read(
    path: pathlib.Path, *, chunks_per_shot: int = 0, switch_frames: Sequence[int] = ()
) -> list[Draft]:
    """What a file or folder tells: a draft for each video, in order.

    Args:
      path: A `.json`, `.jsonl` or `.txt` file, or a folder of captions or of pictures.
      chunks_per_shot: Of a folder of captions, for samples without `shot_durations.txt`; 0 splits
        evenly.
      switch_frames: Of a `.jsonl`, the latent frame of every switch; none is every `SEGMENT_S`.

    Raises:
      InputError: what is wrong with it, and where.
    """
    frames = tuple(switch_frames)
    if any(later <= earlier for earlier, later in itertools.pairwise((0, *frames))):
        words = ", ".join(map(str, frames))
        raise InputError(f"latent frames of switches must rise from above 0, not {words}")
    if chunks_per_shot < 0:
        raise InputError(f"a shot must have 1 chunk or more, not {chunks_per_shot}")
    readers = {
        ".json": _written,
        ".jsonl": functools.partial(_interactive, frames=frames),
        ".txt": _lines,
    }
    with _reading(path):
        if path.is_dir():
            return _folder(path, chunks_per_shot)
        suffix = path.suffix.lower()
        if suffix not in readers:
            kinds = ", ".join(readers)
            raise InputError(
                f"{path} is no story: name a {kinds} file or a folder of captions or pictures"
            )
        text = documents.read_text(path)
        if not text.strip():
            raise InputError(f"{path} is empty: write what to show into it")
        drafts = readers[suffix](path, text)
    names = _names(path.stem, len(drafts))
    return [dataclasses.replace(d, name=name) for d, name in zip(drafts, names, strict=True)]


def outputs(path: pathlib.Path, count: int) -> list[pathlib.Path]:
    """Where so many videos go: `out.mp4`, or `out-000.mp4`, `out-001.mp4` and so on."""
    return [path.with_name(name + path.suffix) for name in _names(path.stem, count)]


def _names(stem: str, count: int) -> list[str]:
    return [stem] if count == 1 else [f"{stem}-{index:03}" for index in range(count)]


def _lasting(config: ModelConfig, latents: int) -> float:
    """Seconds of so many latent frames: those before the first frame of the next."""
    return timeline.first_frame(config, latents) / config.fps


def _story(
    kind: str, placed: list[tuple[str, int]], config: ModelConfig, seconds: float | int, name: str
) -> Story:
    """Prompts at the starts of their chunks; those past the end are left out."""
    frames = timeline.frame_count(config, seconds)
    starts = [timeline.first_frame(config, chunk * config.stream.chunk) for _, chunk in placed]
    events = [
        Event(_no_later(start, config.fps), kind, prompt)
        for start, (prompt, _) in zip(starts, placed, strict=True)
        if start < frames
    ]
    return Story(events[0].prompt, seconds, tuple(events[1:]), name=name)


def _no_later(frame: int, fps: int) -> float:
    """Seconds at which a frame begins, rounded so that times fps it is not after the frame."""
    time = frame / fps
    return time if time * fps <= frame else math.nextafter(time, 0.0)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_time(value: Any) -> bool:
    """Return whether it is a number of seconds, or such text as "1:30"; true is no number."""
    if isinstance(value, str) and ":" in value:
        value = times.read(value)
    return type(value) in (int, float) and abs(value) < timeline.LONGEST


def _seconds(value: Any) -> float | int:
    return times.read(value) if isinstance(value, str) else value


# What a value must be, of every key: in words and as a test. The first key must be there.
Rules = Mapping[str, tuple[str, Callable[[Any], bool]]]
_PROMPT = ('words, such as "a red circle"', _is_prompt)
_PATH = ("the name of a file", _is_prompt)
_STORY = {
    "prompt": _PROMPT,
    "seconds": ("a number of seconds above 0", lambda x: _is_time(x) and _seconds(x) > 0),
    "seed": ("a whole number from 0 to 4294967295", lambda x: type(x) is int and 0 <= x < 2**32),
    "image": _PATH,
    "video": _PATH,
    "events": ('a list of {"at": SECONDS, "switch": "..."}', lambda x: isinstance(x, list)),
}
_EVENT = {
    "at": ("a number of seconds, 0 or more", lambda x: _is_time(x) and _seconds(x) >= 0),
    "switch": _PROMPT,
    "cut": _PROMPT,
}
_SEGMENTS = {
    "prompts": (
        'a list of prompts, such as ["a cat sits", "the cat stands up"]',
        lambda x: isinstance(x, list) and bool(x) and all(map(_is_prompt, x)),
    )
}
_CAPTION = {"caption": _PROMPT}


def _checked(where: pathlib.Path | str, data: Any, rules: Rules, *, strict: bool = False) -> dict:
    """`data` if it is an object that keeps the rules and has the first key of them.

    strict: and has no other keys than these.
    """
    keys = ", ".join(f'"{key}"' for key in rules)
    needed = next(iter(rules))
    if not isinstance(data, dict):
        raise InputError(f"{where} must be an object {{...}} with {keys}, not {_shown(data)}")
    for key, value in data.items():
        if key not in rules and strict:
            raise InputError(f'{where} knows no "{key}", only {keys}')
        if key in rules and not _keeps(where, key, value, rules):
            raise InputError(f'{where}: "{key}" must be {rules[key][0]}, not {_shown(value)}')
    if needed not in data:
        raise InputError(f'{where} has no "{needed}": add {rules[needed][0]}')
    return data


def _keeps(where: pathlib.Path | str, key: str, value: Any, rules: Rules) -> bool:
    try:
        return rules[key][1](value)
    except InputError as error:  # of what only looks like a time
        raise InputError(f'{where}: "{key}": {error}') from error


def _shown(value: Any) -> str:
    """A value as JSON, only its beginning if it is long."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _written(path: pathlib.Path, text: str) -> list[Draft]:
    """A story.json."""
    data = _checked(path, documents.parse(text, str(path)), _STORY, strict=True)
    if "image" in data and "video" in data:
        raise InputError(f'{path} has both "image" and "video": keep the one to begin with')
    files = {key: path.parent / data[key] for key in ("image", "video") if key in data}
    for key, file in files.items():
        if not file.is_file():
            raise InputError(f'{path}: "{key}": there is no file {file}')
    events = [_event(f"{path}: event {n}", e) for n, e in enumerate(data.get("events", []), 1)]
    seconds = _seconds(data["seconds"]) if "seconds" in data else None
    try:
        ordered = in_order(events, math.inf if seconds is None else seconds)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    prompt = data["prompt"].strip()
    return [Story(prompt, seconds, ordered, data.get("seed"), **files)]


def _event(where: str, value: Any) -> Event:
    data = _checked(where, value, _EVENT, strict=True)
    kinds = [kind for kind in ("switch", "cut") if kind in data]
    if len(kinds) != 1:
        raise InputError(f'{where} must have either "switch" or "cut" beside "at"')
    return Event(_seconds(data["at"]), kinds[0], data[kinds[0]].strip())


def _lines(path: pathlib.Path, text: str) -> list[Draft]:
    """A prompt a line."""
    del path
    return [Story(line.strip()) for line in text.split("\n") if line.strip()]


def _interactive(path: pathlib.Path, text: str, frames: tuple[int, ...]) -> list[Draft]:
    """Prompts to switch between, a list a line."""
    drafts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        told = documents.parse(line, str(path), line=number)
        prompts = _checked(where, told, _SEGMENTS)["prompts"]
        if frames and len(frames) != len(prompts) - 1:
            raise InputError(
                f"{where} has {len(prompts)} prompts: give {len(prompts) - 1} latent frames to"
                f" switch at, not {len(frames)}"
            )
        drafts.append(Segments(tuple(prompt.strip() for prompt in prompts), frames))
    return drafts


def _folder(path: pathlib.Path, chunks_per_shot: int) -> list[Draft]:
    """A folder of captions, or of pictures and their prompts."""
    if (path / "caption").is_dir():
        return [_sample(folder, chunks_per_shot) for folder in _samples(path / "caption")]
    pictures = path / "images" if (path / "images").is_dir() else path
    prompts = path / "prompts" if (path / "prompts").is_dir() else pictures
    if images := _images(pictures):
        # A picture may also lie beside captions, as a preview.
        captions = any(listing.shown(place, "*.json") for place in (path, *_folders(path)))
        told = prompts != path or any((prompts / f"{file.stem}.txt").is_file() for file in images)
        if told or not captions:
            return [_pictured(image, prompts) for image in images]
    elif pictures != path:
        raise InputError(f"{pictures} holds no pictures: put {', '.join(IMAGES)} files there")
    return [_sample(folder, chunks_per_shot) for folder in _samples(path)]


def _images(folder: pathlib.Path) -> list[pathlib.Path]:
    found = listing.shown(folder)
    return [path for path in found if path.suffix.lower() in IMAGES and path.is_file()]


def _pictured(image: pathlib.Path, prompts: pathlib.Path) -> Draft:
    """A video that begins with a picture: a shot for each line of the text of the same name."""
    file = prompts / f"{image.stem}.txt"
    if not file.is_file():
        raise InputError(f"{image} has no prompt: write what to show into {file}, a line a shot")
    lines = [line.strip() for line in documents.read_text(file).split("\n") if line.strip()]
    if not lines:
        raise InputError(f"{file} is empty: write what to show into it")
    return Shots(tuple(lines), name=image.stem, image=image)


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    return [entry for entry in listing.shown(path) if entry.is_dir()]


def _samples(root: pathlib.Path) -> list[pathlib.Path]:
    """The folders of captions in a folder, or itself."""
    return _folders(root) or [root]


def _sample(folder: pathlib.Path, chunks_per_shot: int) -> Draft:
    files = [file for file in listing.shown(folder, "*.json") if file.name != "global.json"]
    if not files:
        raise InputError(
            f"{folder} holds no captions: write"
            ' {"caption": "..."} into 0.json for the first shot, 1.json for the next, and so on'
        )
    captions = tuple(_caption(file) for file in sorted(files, key=_shot_order))
    each = (chunks_per_shot,) * len(captions) if chunks_per_shot else ()
    chunks = _durations(folder / "shot_durations.txt") or each
    return Shots(captions, chunks[: len(captions)], folder.resolve().name)


def _shot_order(file: pathlib.Path) -> tuple[bool, int, str]:
    """By number, after all that have none."""
    number = file.stem.isdecimal()
    return number, int(file.stem) if number else 0, file.stem


def _caption(file: pathlib.Path) -> str:
    told = documents.parse(documents.read_text(file), str(file))
    return _checked(file, told, _CAPTION)["caption"].strip()


def _durations(file: pathlib.Path) -> tuple[int, ...]:
    """Chunks of each shot, separated by commas or white space; none if there is no such file."""
    words = documents.read_text(file).replace(",", " ").split() if file.exists() else []
    for word in words:
        if not (word.isdecimal() and len(word) < 10 and int(word)):
            raise InputError(
                f'{file}: "{word}" is no number of chunks: write one for each shot, as in "6, 4, 6"'
            )
    return tuple(map(int, words))


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """Turns what the system says against reading, such as no such file, into `InputError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot read {error.filename or path}: {reason[:1].lower()}{reason[1:]}"
        ) from error
