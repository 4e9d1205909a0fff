"""Checks of what callers of the Python API pass, so that a wrong value is one clear sentence."""

from __future__ import annotations

import operator
from typing import Any

from longlive_jax.errors import InputError
from longlive_jax.flow import TRAIN_STEPS

SEEDS = 2**32


def prompt(value: Any) -> str:
    """The prompt without white space around it."""
    if not isinstance(value, str):
        raise InputError(f"a prompt is a string, not {_shown(value)}")
    if not value.strip():
        raise InputError("the prompt is empty")
    return value.strip()


def seed(value: Any) -> int:
    """The seed of a video's noise."""
    return whole("the seed", value, 0, SEEDS - 1)


def steps(value: Any) -> int:
    """The number of denoising steps."""
    return whole("steps", value, 1, TRAIN_STEPS)


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The value as an int.

    Args:
      name: What to call it.
      value: Of any integer type.
      least: The smallest that is allowed.
      most: The largest; None is no limit.

    Raises:
      InputError: it is no integer, or out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        limits = f"from {least} on" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} must be a whole number {limits}, not {_shown(value)}")
    return number


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python prints no integers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 40 else f"{text[:40]}..."
