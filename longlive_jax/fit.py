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
from longlive_jax.pixels import over_black

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
    rgba = frame.reformat(format="rgba", **options).to_ndarray()
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    return frame_of(over_black(rgb, alpha)), bool((alpha < 255).any())


class Fitter:
    """Makes frames upright, scales them to cover height x width and crops them to their middle.

    Args:
      name: Whose frames they are, for what is said.
      height: In pixels.
      width: In pixels.
      pixel: Width of a pixel over its height.
    """

    def __init__(self, name: str, height: int, width: int, pixel: Fraction = Fraction(1)):
        self.name, self.height, self.width, self.pixel = name, height, width, pixel
        self._turn: Turn | None = None
        self._to_bt709 = filters.ToBT709()

    def __call__(
        self, frame: av.VideoFrame
    ) -> tuple[UInt8[np.ndarray, "height width 3"], tuple[str, ...]]:
        """Return the frame as it was asked for, and what was done to it.

        Raises:
          InputError: it is far too long or too high.
        """
        if self._turn is None:  # the first frame says it for all
            self._turn = filters.turn_of(frame)
        transposed, columns, rows = self._turn
        size, tall, wide = self._covering(frame)
        pixels, notes = self._scaled(frame, *((wide, tall) if transposed else (tall, wide)))
        pixels = pixels.swapaxes(0, 1) if transposed else pixels
        pixels = pixels[:: -1 if rows else 1, :: -1 if columns else 1]
        top, left = (tall - self.height) // 2, (wide - self.width) // 2
        kept = pixels[top : top + self.height, left : left + self.width]
        notes = (
            *notes,
            "turned upright" if any(self._turn) else "",
            f"{size[0]}x{size[1]} scaled to {wide}x{tall}" if size != (wide, tall) else "",
            _cropped(tall - self.height, "row"),
            _cropped(wide - self.width, "column"),
        )
        return np.ascontiguousarray(kept), tuple(note for note in notes if note)

    def _covering(self, frame: av.VideoFrame) -> tuple[tuple[int, int], int, int]:
        """Return width and height of an upright frame, and the height and width to scale it to."""
        assert self._turn is not None
        size = (frame.width, frame.height)
        wide, tall = max(1, round(size[0] * self.pixel)), size[1]
        if self._turn[0]:
            size, (wide, tall) = size[::-1], (tall, wide)
        scale = max(self.height / tall, self.width / wide)
        tall = max(self.height, round(tall * scale))
        wide = max(self.width, round(wide * scale))
        if tall > ELONGATION * self.height or wide > ELONGATION * self.width:
            raise InputError(
                f"{self.name} is {size[0]}x{size[1]}, too far from the shape of"
                f" {self.width}x{self.height}"
            )
        return size, tall, wide

    def _scaled(
        self, frame: av.VideoFrame, height: int, width: int
    ) -> tuple[UInt8[np.ndarray, "height width 3"], tuple[str, str]]:
        """Return it as SDR RGB of that size, before it is turned; and what was done to colours."""
        options: dict[str, Any] = {}
        large = frame.width >= 1280 or frame.height > 576
        if frame.colorspace == UNTAGGED and large and not frame.format.is_rgb:
            options["src_colorspace"] = Colorspace.ITU709  # as players do; smaller is BT.601
        flat, transparent = _opaque(frame, options)
        shrinks = height * width < frame.height * frame.width
        transfer, primaries = int(frame.color_trc), int(frame.color_primaries)
        wide_colours, colours = filters.is_wide(transfer, primaries), ""
        scaled = flat.reformat(
            width=width,
            height=height,
            format="gbrp16le" if wide_colours else "rgb24",
            interpolation=int(Interpolation.AREA if shrinks else Interpolation.BICUBIC) | EXACT,
            **(options if flat is frame else {}),
        )
        if wide_colours:
            scaled, colours = self._to_bt709(scaled, transfer, primaries)
        opaque = "transparent parts made black" if transparent else ""
        return scaled.to_ndarray(format="rgb24"), (colours, opaque)


def _cropped(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''} cropped" if count else ""
