"""Frames made to fit: upright, scaled to cover a size and cropped to it, as opaque SDR RGB."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation
from jaxtyping import UInt8

from longlive_jax import filters
from longlive_jax.errors import InputError
from longlive_jax.filters import Turn

ELONGATION = 16  # a picture that is scaled to more than this many frames side by side is refused
EXACT = 1 << 18 | 1 << 13  # SWS_ACCURATE_RND and SWS_FULL_CHR_H_INT, which PyAV 17 does not name
UNTAGGED = 2  # FFmpeg's number of a colour matrix that is not said


def frame_of(pixels: UInt8[np.ndarray, "H W 3"]) -> av.VideoFrame:
    """Return pixels as a frame of FFmpeg."""
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")


def _opaque(frame: av.VideoFrame, options: dict) -> tuple[av.VideoFrame, bool]:
    """The frame without its alpha, over black, and whether anything was transparent.

    Done before scaling: hidden colours would bleed into their neighbours.
    """
    if not (frame.format.has_palette or any(part.is_alpha for part in frame.format.components)):
        return frame, False
    rgba = frame.reformat(format="rgba", **options).to_ndarray().astype(np.uint16)
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    return frame_of(((rgb * alpha + 127) // 255).astype(np.uint8)), bool((alpha < 255).any())


def fit(
    frame: av.VideoFrame,
    name: str,
    height: int,
    width: int,
    turn: Turn = (False, False, False),
    pixel: Fraction = Fraction(1),
) -> tuple[UInt8[np.ndarray, "{height} {width} 3"], tuple[str, ...]]:
    """Return the frame upright, covering height x width, cropped to its middle; and what was done.

    Args:
      frame: Of any format, size and colours.
      name: Whose it is, for what is said.
      height: In pixels.
      width: In pixels.
      turn: What makes it upright.
      pixel: Width of a pixel over its height.

    Raises:
      InputError: it is far too long or too high.
    """
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
    transfer, primaries = int(frame.color_trc), int(frame.color_primaries)
    wide_colours = filters.is_wide(transfer, primaries)
    shrunk = flat.reformat(
        width=tall if transposed else wide,
        height=wide if transposed else tall,
        format="gbrp16le" if wide_colours else "rgb24",
        interpolation=int(method) | EXACT,
        **(options if flat is frame else {}),
    )
    colours = ""
    if wide_colours:
        shrunk, colours = filters.to_bt709(shrunk, transfer, primaries)
    scaled = shrunk.to_ndarray(format="rgb24")
    scaled = scaled.swapaxes(0, 1) if transposed else scaled
    scaled = scaled[:: -1 if rows else 1, :: -1 if columns else 1]
    top, left = (tall - height) // 2, (wide - width) // 2
    notes = (
        colours,
        "transparent parts made black" if transparent else "",
        "turned upright" if any(turn) else "",
        f"{size[0]}x{size[1]} scaled to {wide}x{tall}" if size != (wide, tall) else "",
        _cropped(tall - height, "row"),
        _cropped(wide - width, "column"),
    )
    kept = np.ascontiguousarray(scaled[top : top + height, left : left + width])
    return kept, tuple(note for note in notes if note)


def _cropped(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''} cropped" if count else ""
