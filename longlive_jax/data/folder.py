"""Folders of training videos, in the layout of LongLive 2.0 (`utils/dataset.py`):

    video/<sample>/0.mp4, 1.mp4, ...      the shots of a sample, in order
    caption/<sample>/0.json, 1.json, ...  {"caption": "..."} of each
    caption/<sample>/shot_durations.txt   chunks of each shot, for prompts without videos

A video without a caption is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8

from longlive_jax import documents, listing
from longlive_jax.clips import footage
from longlive_jax.clips import read as read_frames
from longlive_jax.data.montage import Clip, MontageConfig, Plan
from longlive_jax.errors import InputError

SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")


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
    return [path for path in listing.shown(root) if path.is_dir()]


def _sample(root: pathlib.Path, folder: pathlib.Path) -> Sample:
    videos = [file for file in listing.shown(folder) if file.suffix.lower() in SUFFIXES]
    return Sample(folder.name, tuple(sorted(videos, key=_order)), root / "caption" / folder.name)


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
    """Frames of a file by their numbers, which never fall: see `longlive_jax.clips.read`.

    Raises:
      InputError: the file cannot be read, is damaged, or lacks one of the frames.
    """
    return read_frames(path, indices, height, width)[0]


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
