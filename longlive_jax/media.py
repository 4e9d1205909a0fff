"""Pictures and clips in: decoded, turned upright, scaled to cover a frame and cropped to it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator

import av
import numpy as np
from jaxtyping import UInt8

from longlive_jax import clips, demux
from longlive_jax.errors import InputError
from longlive_jax.fit import Fitter, frame_of

Source = str | os.PathLike[str] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of the size asked for, and what was done to it ("" is nothing)."""

    frames: UInt8[np.ndarray, "1 height width 3"]
    note: str


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames of the size and rate asked for, and what was done to them ("" is nothing)."""

    frames: UInt8[np.ndarray, "t height width 3"]
    note: str


def read_image(source: Source, height: int, width: int) -> Picture:
    """A picture, scaled until it covers height x width and cropped to its middle.

    Transparent parts are black. JPEG, PNG and WebP are turned as their EXIF data say.

    Args:
      source: A file, or uint8 [H, W, 3].
      height: In pixels.
      width: In pixels.

    Raises:
      InputError: the file cannot be read, is damaged, is no picture or more than one.
    """
    if isinstance(source, np.ndarray):
        frame = frame_of(_checked(source, "a picture", "H W 3"))
        pixels, notes = Fitter("the picture", height, width)(frame)
    else:
        with clips.open_video(source, "picture") as (container, stream):
            if stream.codec_context.name == "mjpeg":  # else half a JPEG passes
                explode = {"err_detect": "explode"}
                stream.codec_context.options = demux.LIMITS | explode
            decoded = _whole(source, clips.decode(container, stream))
            frame = next(decoded, None)
            if frame is None:
                raise InputError(f"{source} holds no picture")
            # After the first picture of a JPEG come thumbnails, gain maps or a short clip.
            jpeg = container.format.name in ("jpeg_pipe", "mjpeg")
            if not jpeg and next(decoded, None) is not None:
                raise InputError(f"{source} holds more than one picture")
            pixels, notes = Fitter(str(source), height, width)(frame)
    return Picture(pixels[None], _listed(notes))


def read_clip(
    source: Source,
    height: int,
    width: int,
    fps: int,
    *,
    frames: int | None = None,
    last: int | None = None,
) -> Clip:
    """A clip at `fps`: frame n is what it shows after n/fps seconds, fitted like a picture.

    A file with a single frame gives that frame. Of a file, only what is returned is held in memory.

    Args:
      source: A file, or uint8 [t, H, W, 3] at `fps`.
      height: In pixels.
      width: In pixels.
      fps: Frames per second.
      frames: Reading stops after so many; None reads all.
      last: Only so many at the end are read; None reads all.

    Raises:
      InputError: the file cannot be read, is damaged or holds no video.
    """
    if isinstance(source, np.ndarray):
        shown = _checked(source, "a clip", "t H W 3")
        used = shown[_part(len(shown), frames, last)]
        fit = Fitter("the clip", height, width)
        fitted = [fit(frame_of(pixels)) for pixels in used]
        pixels, notes = np.stack([pixels for pixels, _ in fitted]), list(fitted[0][1])
    else:
        shot = clips.footage(source)
        shown = shot.shown_at(fps)
        used = shown[_part(len(shown), frames, last)]
        pixels, said = clips.read(source, used.tolist(), height, width)
        changed = len(shown) > 1 and shot.fps != fps
        notes = [f"{float(shot.fps):.4g} FPS read at {fps} FPS"] if changed else []
        notes += [*shot.notes, *said]
    if last is not None and len(shown) > last:
        seconds = clips.span(len(shown) / fps)
        notes.append(f"only the last {clips.span(last / fps)} of its {seconds} are used")
    return Clip(pixels, _listed(notes))


def _part(count: int, frames: int | None, last: int | None) -> slice:
    return slice(None if last is None else max(0, count - last), frames)


def _whole(path: object, decoded: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    for frame in decoded:
        if frame.is_corrupt:
            raise InputError(f"{path} is damaged")
        yield frame


def _checked(array: np.ndarray, what: str, shape: str) -> np.ndarray:
    axes = shape.split()
    if array.dtype != np.uint8 or array.ndim != len(axes) or array.shape[-1] != 3:
        raise InputError(
            f"{what} is uint8 [{', '.join(axes)}], not {array.dtype} {list(array.shape)}"
        )
    if not array.size:
        raise InputError(f"{what} of shape {list(array.shape)} is empty")
    return array


def _listed(notes: Iterable[str]) -> str:
    return ", ".join(notes)
