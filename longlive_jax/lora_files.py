"""LoRA files and their strengths, as a flag, `load` and `Session.adapt` take them."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Sequence
from typing import Any

from longlive_jax.errors import InputError

LARGEST = 3.4e38  # of a strength, which is kept in float32


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """A file or folder that holds a LoRA.

    Args:
      path: Where it is.
      strength: What it is multiplied with. 0 leaves it out, a negative one takes it away.
    """

    path: str
    strength: float | int = 1.0

    def check(self) -> None:
        """Raise InputError where there is no such file, or the strength is not finite."""
        self.check_strength()
        if not os.path.exists(self.path):
            raise InputError(f'there is no "{self.path}"')

    def check_strength(self) -> None:
        """Raise InputError where float32 cannot hold the strength."""
        if not (math.isfinite(self.strength) and abs(self.strength) <= LARGEST):
            raise InputError(
                f"the strength of the LoRA {self.path} is a finite number, not {self.strength:g}"
            )


# A file; or several, each a path or a pair of a path and a strength.
Choice = str | os.PathLike | LoraFile | Sequence[Any] | None


def parse(text: str) -> LoraFile:
    """A LoRA of the form FILE or FILE=STRENGTH. The last "=" is in front of a strength only if a
    number follows and FILE exists: names of files may have an "=", too.

    Raises:
      InputError: there is no such file, or the strength is no finite number.
    """
    path, sign, number = text.rpartition("=")
    strength = _number(number) if sign and path else None
    if strength is not None and (os.path.exists(path) or not os.path.exists(text)):
        file = LoraFile(path, strength)
    else:
        file = LoraFile(text)
    if not text:
        raise InputError("say which file: --lora FILE, or FILE=STRENGTH")
    if not os.path.exists(file.path):
        hint = ""
        if sign and strength is None and path and os.path.exists(path):
            hint = f"; a strength is a number, not {number[:40]!r}"
        raise InputError(f"--lora: there is no {file.path}{hint}")
    file.check()
    return file


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def listed(lora: Any) -> tuple[LoraFile, ...] | None:
    """The LoRAs of a choice in Python, in order; None where nothing is chosen.

    Args:
      lora: A path; or paths, pairs of a path and a strength, and `LoraFile`s in a sequence.

    Raises:
      InputError: it is none of these, or a strength is no finite number.
    """
    if lora is None:
        return None
    if isinstance(lora, LoraFile | str | os.PathLike) or _is_pair(lora):
        lora = [lora]
    if not isinstance(lora, Sequence):
        raise InputError(f"a LoRA is a file, or pairs of a file and a strength, not {lora!r:.60}")
    return tuple(map(_file, lora))


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and isinstance(value[0], str | os.PathLike)
        and isinstance(value[1], numbers.Real)
    )


def _strength(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _file(value: Any) -> LoraFile:
    if isinstance(value, str | os.PathLike):
        value = LoraFile(os.fspath(value))
    elif _is_pair(value) and not isinstance(value[1], bool):
        value = LoraFile(os.fspath(value[0]), _strength(value[1]))
    if not isinstance(value, LoraFile):
        raise InputError(f"a LoRA is a file, or a pair of a file and a strength, not {value!r:.60}")
    value.check_strength()
    return value
