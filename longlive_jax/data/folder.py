"""Folders of training videos, in the layout of LongLive 2.0 (`utils/dataset.py`):

    video/<sample>/0.mp4, 1.mp4, ...      the shots of a sample, in order
    caption/<sample>/0.json, 1.json, ...  {"caption": "..."} of each
    caption/<sample>/shot_durations.txt   chunks of each shot, for prompts without videos

A video without a caption is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from jaxtyping import Int, UInt8

from longlive_jax import documents
from longlive_jax.data.montage import Clip, MontageConfig, Plan
from longlive_jax.errors import InputError
from longlive_jax.media import fit, open_video, turn_of

SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")
REMEMBERED = 1024  # files whose frames' times are kept: 8 bytes a frame


@dataclasses.dataclass(frozen=True)
class Sample:
    """One long video: its shots, and the folder of their captions."""

    name: str
    videos: tuple[pathlib.Path, ...]
    captions: pathlib.Path

    def caption_file(self, video: pathlib.Path) -> pathlib.Path:
        return self.captions / f"{video.stem}.json"


def samples(root: pathlib.Path) -> list[Sample]:
    """The samples of a data set, by name; nothing in them is opened.

    Raises:
      InputError: it is not laid out as this module says, or is empty.
    """
    for name in ("video", "caption"):
        if not (root / name).is_dir():
            raise InputError(
                f"{root} is no data set: there is no folder {root / name}; put shots into"
                " video/NAME/0.mp4 and their captions into caption/NAME/0.json"
            )
    with reading(root):
        found = [_sample(root, folder) for folder in folders(root / "video")]
    if not found:
        raise InputError(f"{root / 'video'} holds no folders: put shots into video/NAME/0.mp4")
    return found


def folders(root: pathlib.Path) -> list[pathlib.Path]:
    """The folders in a folder by name, without hidden ones."""
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")


def _sample(root: pathlib.Path, folder: pathlib.Path) -> Sample:
    files = [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES]
    shown = [file for file in files if file.name[0] != "."]
    return Sample(folder.name, tuple(sorted(shown, key=_order)), root / "caption" / folder.name)


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Turns what the system says against reading, such as no permission, into `InputError`."""
    try:
        yield
    except OSError as error:
        reason = str(error.strerror or error).lower()
        raise InputError(f"cannot read {error.filename or path}: {reason}") from error


def _order(file: pathlib.Path) -> tuple[bool, int, str]:
    """By number, before all that have none."""
    number = file.stem.isdecimal()
    return not number, int(file.stem) if number else 0, file.name


def caption(file: pathlib.Path) -> str:
    """What a shot's file says of it; "" if that is nothing, or there is no such file.

    Raises:
      InputError: the file cannot be read, or is not of the form {"caption": "..."}.
    """
    with reading(file):
        data = documents.read(file) if file.exists() else {}
    said = data.get("caption", "") if isinstance(data, dict) else None
    if not isinstance(said, str):
        raise InputError(f'{file} is not of the form {{"caption": "..."}}')
    return said.strip()


@dataclasses.dataclass(frozen=True)
class Footage:
    """What a video file holds."""

    height: int
    width: int
    fps: Fraction
    times: Int[np.ndarray, " t"]  # of its frames, rising, in the units of the file

    @property
    def seconds(self) -> float:
        return float(len(self.times) / self.fps)


def footage(path: pathlib.Path) -> Footage:
    """Counts the frames of a video file without decoding them.

    Raises:
      InputError: the file cannot be read, is damaged or cut short, or holds no video.
    """
    with reading(path):
        stat = os.stat(path)
    return _footage(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(REMEMBERED)
def _footage(path: pathlib.Path, size: int, changed: int) -> Footage:
    del size, changed  # they are there to tell files apart
    with open_video(path, "video") as (container, stream):
        # Packets go as they come: together they are the whole file.
        found = [(_time(p), p.is_discard) for p in container.demux(stream) if p.size]
        times = [time for time, dropped in found if not dropped]
        if stream.frames > len(found):
            raise InputError(
                f"{path} is cut short: {len(found)} of its {stream.frames} frames are there"
            )
        if not times or None in times or not stream.average_rate:
            raise InputError(f"{path} holds no video, or does not say when its frames are shown")
        coded = stream.codec_context
        rate = Fraction(stream.average_rate)
        return Footage(coded.height, coded.width, rate, np.sort(np.array(times, np.int64)))


def _time(shown: av.Packet | av.VideoFrame) -> int | None:
    return shown.dts if shown.pts is None else shown.pts


def clips(sample: Sample) -> list[Clip]:
    """The shots that have a caption, in order.

    Raises:
      InputError: one of them, or its caption, cannot be read.
    """
    said = [(video, caption(sample.caption_file(video))) for video in sample.videos]
    return [clip(video, prompt) for video, prompt in said if prompt]


def clip(video: pathlib.Path, prompt: str) -> Clip:
    """A video file as a shot of that prompt.

    Raises:
      InputError: it cannot be read.
    """
    shot = footage(video)
    return Clip(video.name, len(shot.times), float(shot.fps), prompt)


def read(
    path: pathlib.Path, indices: Sequence[int], height: int, width: int
) -> UInt8[np.ndarray, "t height width 3"]:
    """Frames of a file by their numbers, which never fall; fitted as `media.read_clip` does.

    Only what lies between the key frame before the first of them and the last is decoded.

    Raises:
      InputError: the file cannot be read, is damaged, or lacks one of the frames.
    """
    times = footage(path).times
    if not 0 <= indices[0] <= indices[-1] < len(times):
        raise InputError(f"{path} has {len(times)} frames, not frame {indices[-1]}")
    frames = np.empty((len(indices), height, width, 3), np.uint8)
    done = 0
    with open_video(path, "video") as (container, stream):
        turn, pixel = None, Fraction(stream.sample_aspect_ratio or 1)
        for number, frame in _numbered(container, stream, times, indices[0]):
            if number < indices[done]:
                continue
            if number > indices[done] or frame.is_corrupt:
                break
            turn = turn_of(frame) if turn is None else turn
            pixels, _ = fit(frame, str(path), height, width, turn, pixel)
            while done < len(indices) and indices[done] == number:
                frames[done] = pixels
                done += 1
            if done == len(indices):
                return frames
    raise InputError(f"{path} is damaged at frame {indices[done]}")


def _numbered(
    container: Any, stream: Any, times: np.ndarray, first: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames and their numbers, from one at or before `first` on."""
    decoded = _timed(container, stream)
    # A key frame may be decoded before the instant sought and shown after it.
    for origin in (times[first], times[0]) if first else ():
        container.seek(int(origin), stream=stream)
        decoded = _timed(container, stream)
        opening = next(decoded, None)
        if opening is not None and opening[0] <= times[first]:
            decoded = itertools.chain([opening], decoded)
            break
    for time, frame in decoded:
        yield int(np.searchsorted(times, time)), frame


def _timed(container: Any, stream: Any) -> Iterator[tuple[int, av.VideoFrame]]:
    for frame in container.decode(stream):
        time = _time(frame)
        if time is not None:
            yield time, frame


def frames(
    sample: Sample, plan: Plan, cfg: MontageConfig, height: int, width: int
) -> UInt8[np.ndarray, "t height width 3"]:
    """The frames of a sequence; padding repeats the last one.

    Raises:
      InputError: a file of it cannot be read or is damaged.
    """
    files = {video.name: video for video in sample.videos}
    shown = np.empty((cfg.frames, height, width, 3), np.uint8)
    done = 0
    # Windows of a file follow each other, so that each file is read once.
    for name, windows in itertools.groupby(plan.windows, lambda window: window.file):
        step = float(footage(files[name]).fps) / cfg.fps
        indices = [index for window in windows for index in window.indices(step)]
        shown[done : done + len(indices)] = read(files[name], indices, height, width)
        done += len(indices)
    shown[done:] = shown[done - 1]
    return shown
