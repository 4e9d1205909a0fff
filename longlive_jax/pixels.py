"""Pictures and clips as Python has them: PIL images, arrays of any library, lists of frames.

They become what the reader of files hands over: uint8 [H, W, 3], upright, transparent parts black.
Pillow itself is not imported: an image of it is known by what it can do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

from longlive_jax import demux
from longlive_jax.errors import InputError

SLACK = 1e-3  # by which numbers that were resized go beyond 0 and 1
_FLOATS = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
_ORIENTATION = 0x0112  # the number of EXIF's tag
# What turns a picture upright, of its orientation: transpose, reverse the columns, then the rows.
_TURNS = {
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
_OPAQUE = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
_KINDS = "a file, a PIL image or an array"


def is_file(source: Any) -> bool:
    """Return whether it is the name of a file, and not a picture."""
    return isinstance(source, str | os.PathLike)


def picture(source: Any) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
    """Return one picture, and what was done to it ("" is nothing).

    Args:
      source: A PIL image, or an array: uint8, or floating numbers from 0 to 1, [H, W] or [H, W, c]
        with 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGB and alpha) channels.

    Raises:
      InputError: it is something else, or is empty.
    """
    return _picture(source, "the picture")


def clip(source: Any) -> tuple[UInt8[np.ndarray, "t H W 3"], str]:
    """Return the frames of a clip, and what was done to them ("" is nothing).

    Args:
      source: A list of what `picture` takes, all of one size, or an array [t, H, W] or
        [t, H, W, c].

    Raises:
      InputError: it is something else, or is empty.
    """
    made: np.ndarray | None = None
    notes: list[str] = []
    frames, count = _frames(source)
    for number, frame in enumerate(frames):
        pixels, note = _picture(frame, f"frame {number} of the clip")
        if made is None:
            made = np.empty((count, *pixels.shape), np.uint8)
        if pixels.shape != made.shape[1:]:
            raise InputError(
                f"the frames of a clip are of one size: frame {number} is {_size(pixels.shape)},"
                f" the first {_size(made.shape[1:])}"
            )
        made[number] = pixels
        notes += [] if note in notes else [note]
    if made is None:
        raise InputError("the clip is empty")
    return made, ", ".join(filter(None, notes))


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _frames(source: Any) -> tuple[Iterator[Any], int]:
    if isinstance(source, list | tuple):
        return iter(source), len(source)
    if _is_pillow(source):
        raise InputError("a clip is a list of pictures: an animated one is read from its file")
    array = _array(source, "a clip")
    if array.ndim not in (3, 4) or (array.ndim == 3 and array.shape[-1] <= 4):
        shape = list(array.shape)
        raise InputError(f"a clip is uint8 [t, H, W, 3], not {array.dtype} {shape}")
    return iter(array), len(array)


def _picture(source: Any, name: str) -> tuple[np.ndarray, str]:
    if _is_pillow(source):
        return _of_pillow(source, name)
    if is_file(source):
        raise InputError(f"{name} is a file: give the whole clip as one, or read its pictures")
    return _opaque(_eight_bit(_array(source, name), name), name)


def _array(source: Any, name: str) -> np.ndarray:
    known = ("__array_interface__", "__array__", "__dlpack__")
    if not any(hasattr(source, attribute) for attribute in known):
        raise InputError(f"{name} is {_KINDS}, not a {type(source).__name__}")
    try:
        return np.asarray(source)
    except (TypeError, ValueError, RuntimeError) as error:  # on another device, or with gradients
        reason = " ".join(str(error).split())
        raise InputError(f"{name} cannot be made an array: {reason}") from error


def _eight_bit(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype not in _FLOATS:
        what = f"{array.dtype} {list(array.shape)}"
        raise InputError(f"{name} is uint8, or floating numbers from 0 to 1, not {what}")
    wide = array.astype(np.float32)
    if wide.size and not (wide.min() >= -SLACK and wide.max() <= 1 + SLACK):
        raise InputError(
            f"{name} has floating numbers from {wide.min():.4g} to {wide.max():.4g}: scale them to"
            " 0 to 1, or give uint8"
        )
    return np.rint(np.clip(wide, 0, 1) * 255).astype(np.uint8)


def _opaque(array: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """RGB of 1 to 4 channels, over black where there is alpha."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or not 1 <= array.shape[-1] <= 4:
        first = array.ndim == 3 and array.shape[0] <= 4
        hint = ": its channels come first, but belong last" if first else ""
        raise InputError(f"{name} is uint8 [H, W, 3], not {array.dtype} {list(array.shape)}{hint}")
    if not array.size:
        raise InputError(f"{name} of shape {list(array.shape)} is empty")
    channels = array.shape[-1]
    colours = array[..., :3] if channels >= 3 else np.repeat(array[..., :1], 3, -1)
    if channels % 2:
        return np.ascontiguousarray(colours), ""
    alpha = array[..., -1:]
    composed = over_black(colours, alpha)
    return composed, "transparent parts made black" if bool((alpha < 255).any()) else ""


def over_black(
    colours: UInt8[np.ndarray, "H W 3"], alpha: UInt8[np.ndarray, "H W 1"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Return colours of which as much is left as they are opaque."""
    wide = colours.astype(np.uint16) * alpha
    return ((wide + 127) // 255).astype(np.uint8)


def _is_pillow(source: Any) -> bool:
    needed = ("mode", "size", "convert", "getexif", "info")
    return all(hasattr(source, attribute) for attribute in needed)


def _of_pillow(image: Any, name: str) -> tuple[np.ndarray, str]:
    width, height = image.size
    if width * height > demux.MOST_PIXELS:
        most = f"{demux.MOST_PIXELS / 1e6:.0f} megapixels, the most that is read"
        raise InputError(f"{name} is {width}x{height}, more than {most}")
    # A JPEG of some cameras has thumbnails or gain maps after its picture.
    if getattr(image, "n_frames", 1) > 1 and getattr(image, "format", "") not in ("JPEG", "MPO"):
        raise InputError(f"{name} holds more than one picture")
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
        pixels, note = _opaque(_channels(image, name), name)
    except (OSError, SyntaxError) as error:  # Pillow decodes only now
        raise InputError(f"{name} is damaged: {error}") from error
    if turn is None:
        return pixels, note
    transposed, columns, rows = turn
    pixels = pixels.swapaxes(0, 1) if transposed else pixels
    pixels = pixels[:: -1 if rows else 1, :: -1 if columns else 1]
    return np.ascontiguousarray(pixels), ", ".join(filter(None, (note, "turned upright")))


def _channels(image: Any, name: str) -> np.ndarray:
    """Return its values in 8 bits: grey, RGB, or RGB and alpha."""
    if image.mode in _TRANSPARENT or (image.mode in _OPAQUE and "transparency" in image.info):
        return np.asarray(image.convert("RGBA"))
    if image.mode in _OPAQUE:
        return np.asarray(image.convert("RGB"))
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return ((grey + 128) // 257).astype(np.uint8)
    raise InputError(
        f'{name} is a PIL image of mode "{image.mode}": make it "RGB", or an array from 0 to 1'
    )
