"""Pictures and clips in: decoded, turned upright, scaled to cover a frame and cropped to it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import av.filter
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import Colorspace, Interpolation
from jaxtyping import UInt8

from longlive_jax import demux
from longlive_jax.errors import InputError

Source = str | os.PathLike[str] | np.ndarray
Turn = tuple[bool, bool, bool]  # transpose, then reverse the columns, then the rows

ROUNDING = Fraction(1, 1000)  # s: to which Matroska rounds the times of frames
ELONGATION = 16  # a picture that is scaled to more than this many frames side by side is refused
BRANDS = ("major_brand", "compatible_brands")  # of an MP4 or a relative of it
EXACT = 1 << 18 | 1 << 13  # SWS_ACCURATE_RND and SWS_FULL_CHR_H_INT, which PyAV 17 does not name
UNTAGGED = 2  # FFmpeg's number of a colour matrix that is not said


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
        frame = _frame(_checked(source, "a picture", "H W 3"))
        pixels, note = fit(frame, "the picture", height, width)
    else:
        with open_video(source, "picture") as (container, stream):
            if stream.codec_context.name == "mjpeg":  # else half a JPEG passes
                explode = {"err_detect": "explode"}
                stream.codec_context.options = demux.LIMITS | explode
            decoded = _whole(source, container.decode(stream))
            frame = next(decoded, None)
            if frame is None:
                raise InputError(f"{source} holds no picture")
            # After the first picture of a JPEG come thumbnails, gain maps or a short clip.
            jpeg = container.format.name in ("jpeg_pipe", "mjpeg")
            if not jpeg and next(decoded, None) is not None:
                raise InputError(f"{source} holds more than one picture")
            pixels, note = fit(frame, str(source), height, width, turn_of(frame))
    return Picture(pixels[None], note)


def read_clip(
    source: Source, height: int, width: int, fps: int, *, frames: int | None = None
) -> Clip:
    """A clip at `fps`: frame n is what it shows after n/fps seconds, fitted like a picture.

    Frames are scaled as they are decoded. A file with a single frame gives that frame.

    Args:
      source: A file, or uint8 [t, H, W, 3] at `fps`.
      height: In pixels.
      width: In pixels.
      fps: Frames per second.
      frames: Reading stops after so many; None reads all.

    Raises:
      InputError: the file cannot be read, is damaged or holds no video.
    """
    fitted: list[tuple[np.ndarray, str]] = []
    if isinstance(source, np.ndarray):
        for pixels in _checked(source, "a clip", "t H W 3")[:frames]:
            fitted.append(fit(_frame(pixels), "the clip", height, width))
        return Clip(np.stack([pixels for pixels, _ in fitted]), fitted[0][1])
    with open_video(source, "video") as (container, stream):
        turn, pixel = None, Fraction(stream.sample_aspect_ratio or 1)
        decoded = _whole(source, container.decode(stream))
        for frame, count in _in_force(decoded, fps):
            if turn is None:
                turn = turn_of(frame)
            if count:
                fitted += [fit(frame, str(source), height, width, turn, pixel)] * count
            if frames is not None and len(fitted) >= frames:
                break
        rate = stream.average_rate
    if not fitted:
        raise InputError(f"{source} holds no video")
    changed = len(fitted) > 1 and rate and rate != fps
    notes = [f"{float(rate):.4g} FPS read at {fps} FPS" if changed else "", fitted[0][1]]
    return Clip(np.stack([pixels for pixels, _ in fitted[:frames]]), _listed(notes))


@contextlib.contextmanager
def open_video(path: str | os.PathLike[str], what: str) -> Iterator[tuple[Any, Any]]:
    """The opened file and its video stream."""
    with demux.opened(path, what) as container:
        brands = "".join(container.metadata.get(name, "") for name in BRANDS)
        if "heic" in brands or "heix" in brands:
            # These are cut into tiles, each of which is a stream.
            raise InputError(f"{path} is a HEIC picture: save it as JPEG or PNG")
        for stream in container.streams.video:
            cover = stream.disposition & Disposition.attached_pic  # of a song
            if stream.codec_context is not None and not cover:
                _check_size(path, stream.codec_context)
                # Not of frames: such threads now and then lose that a frame is damaged.
                stream.thread_type = "SLICE"
                yield container, stream
                return
        raise InputError(f"{path} holds no {what}")


def _check_size(path: object, coded: Any) -> None:
    """Few bytes can claim to be any number of pixels."""
    if coded.width * coded.height > demux.MOST_PIXELS:
        raise InputError(
            f"{path} is {coded.width}x{coded.height}, more than"
            f" {demux.MOST_PIXELS / 1e6:.0f} megapixels, the most that is read"
        )
    coded.options = demux.LIMITS  # sizes may change within a file


def _whole(path: object, decoded: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    for frame in decoded:
        if frame.is_corrupt:
            raise InputError(f"{path} is damaged")
        yield frame


def _in_force(decoded: Iterator[av.VideoFrame], fps: int) -> Iterator[tuple[av.VideoFrame, int]]:
    """Each frame, and how many of the instants n/fps fall into the time that it is shown."""
    held, alone, shown = None, True, 0
    begin = start = end = step = Fraction(0)

    def due(time: Fraction) -> int:
        return max(shown, math.ceil((time - begin - ROUNDING) * fps))

    for frame in decoded:
        # A bare stream has no times: each frame follows the one before.
        time = end if frame.pts is None else frame.pts * frame.time_base
        if held is None:
            begin = time
        else:
            yield held, due(time) - shown
            alone, shown, step = False, due(time), time - start
        held, start = frame, time
        end = time + (frame.duration * frame.time_base if frame.duration else step)
    if held is not None:
        yield held, (1 if alone else max(1, due(end)) - shown)


def _checked(array: np.ndarray, what: str, shape: str) -> np.ndarray:
    axes = shape.split()
    if array.dtype != np.uint8 or array.ndim != len(axes) or array.shape[-1] != 3:
        raise InputError(
            f"{what} is uint8 [{', '.join(axes)}], not {array.dtype} {list(array.shape)}"
        )
    if not array.size:
        raise InputError(f"{what} of shape {list(array.shape)} is empty")
    return array


def _frame(pixels: UInt8[np.ndarray, "H W 3"]) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")


def turn_of(frame: av.VideoFrame) -> Turn:
    """What makes it upright, mirrored or not, by its display matrix."""
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )
    # PyAV reads no side data at all where there is a kind that it does not know, such as EXIF.
    unknown = set(range(64)) - {kind.value for kind in SideData}
    dropped = [graph.add("sidedata", f"mode=delete:type={kind}") for kind in unknown]
    graph.link_nodes(source, *dropped, graph.add("buffersink"))
    graph.configure()
    graph.push(frame)
    matrix = graph.pull().side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return (False, False, False)
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # x' = ax + cy, y' = bx + dy
    return (True, c < 0, b < 0) if abs(b) > abs(a) else (False, a < 0, d < 0)


def _opaque(frame: av.VideoFrame, options: dict) -> tuple[av.VideoFrame, bool]:
    """The frame without its alpha, over black, and whether anything was transparent.

    Done before scaling: hidden colours would bleed into their neighbours.
    """
    if not (frame.format.has_palette or any(part.is_alpha for part in frame.format.components)):
        return frame, False
    rgba = frame.reformat(format="rgba", **options).to_ndarray().astype(np.uint16)
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    return _frame(((rgb * alpha + 127) // 255).astype(np.uint8)), bool((alpha < 255).any())


def fit(
    frame: av.VideoFrame,
    name: str,
    height: int,
    width: int,
    turn: Turn = (False, False, False),
    pixel: Fraction = Fraction(1),  # width of a pixel over its height
) -> tuple[UInt8[np.ndarray, "{height} {width} 3"], str]:
    """The frame upright, covering height x width, cropped to its middle; and what was done."""
    transposed, columns, rows = turn
    size = (frame.width, frame.height)
    wide, tall = max(1, round(size[0] * pixel)), size[1]
    if transposed:
        size, (wide, tall) = size[::-1], (tall, wide)
    scale = max(height / tall, width / wide)
    tall, wide = max(height, round(tall * scale)), max(width, round(wide * scale))
    if tall > ELONGATION * height or wide > ELONGATION * width:
        raise InputError(
            f"{name} is {size[0]}x{size[1]}, too far from the shape of {width}x{height}"
        )
    options: dict[str, Any] = {}
    large = frame.width >= 1280 or frame.height > 576
    if frame.colorspace == UNTAGGED and large and not frame.format.is_rgb:
        options["src_colorspace"] = Colorspace.ITU709  # as players do; what is smaller is BT.601
    flat, transparent = _opaque(frame, options)
    method = Interpolation.AREA if scale < 1 else Interpolation.BICUBIC
    scaled = flat.reformat(
        width=tall if transposed else wide,
        height=wide if transposed else tall,
        format="rgb24",
        interpolation=int(method) | EXACT,
        **(options if flat is frame else {}),
    ).to_ndarray()
    scaled = scaled.swapaxes(0, 1) if transposed else scaled
    scaled = scaled[:: -1 if rows else 1, :: -1 if columns else 1]
    top, left = (tall - height) // 2, (wide - width) // 2
    notes = (
        "transparent parts made black" if transparent else "",
        "turned upright" if any(turn) else "",
        f"{size[0]}x{size[1]} scaled to {wide}x{tall}" if size != (wide, tall) else "",
        _cropped(tall - height, "row"),
        _cropped(wide - width, "column"),
    )
    return np.ascontiguousarray(scaled[top : top + height, left : left + width]), _listed(notes)


def _cropped(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''} cropped" if count else ""


def _listed(notes: Any) -> str:
    return ", ".join(note for note in notes if note)
