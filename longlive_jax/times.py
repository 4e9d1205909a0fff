"""Times as people write them: seconds, m:ss or h:mm:ss, and where a time ends and a prompt begins.

The only reader of times: flags, "TIME: PROMPT" and stories come here.
"""

from __future__ import annotations

import math
import re

from longlive_jax.errors import InputError

FORMS = "seconds, m:ss or h:mm:ss"

# Decimals after a comma are those of subtitles, and of much of Europe.
_CLOCK = re.compile(r"(?:([0-9]+):)?([0-9]+):([0-9]{2}(?:[.,][0-9]+)?)")
_NUMBER = r"[0-9]*[.,]?[0-9]+"
# Numbers with nothing but colons between them, at the start of "TIME: PROMPT".
_RUN = re.compile(rf"\s*([-+]?{_NUMBER}(?::{_NUMBER})+)(.*)", re.DOTALL)


def read(text: str) -> float:
    """Return the seconds of a time: "90", "1:30" and "0:01:30" are the same; the last part may have
    decimals.

    Whether the number makes sense where it is used, such as one below 0, is not checked.

    Raises:
      InputError: it is no time.
    """
    word = text.strip()
    if ":" in word:
        return _clock(word)
    try:
        return float(word)
    except ValueError as error:
        message = f'"{_short(text)}" is no time: write {FORMS}, such as 90 or 1:30'
        raise InputError(message) from error


def split(text: str) -> tuple[float, str]:
    """Return the seconds and the prompt of "TIME: PROMPT", such as "5: birds" or "1:30: birds".

    The colon that ends a time is the first one that has no number right after it: "1:30: birds" is
    at 90 s, "1: 30 birds" at 1 s. "1:30 birds" could be either.

    Raises:
      InputError: there is no time, no prompt, or it can be read in two ways.
    """
    time, prompt = _parted(text)
    if ":" in time:
        seconds = _clock(time)
    else:
        seconds = _number(time)
    if not math.isfinite(seconds):
        raise InputError(
            f'"{_short(text)}" is not of the form "SECONDS: PROMPT", as in "5: a blue square" or'
            ' "1:30: a blue square"'
        )
    if not prompt.strip():
        raise InputError(f'"{_short(text)}" has no prompt after the colon')
    return seconds, prompt.strip()


def _parted(text: str) -> tuple[str, str]:
    """Divide a text at the colon that ends the time."""
    run = _RUN.fullmatch(text)
    if run is None:
        time, colon, prompt = text.partition(":")
        return (time if colon else "", prompt)
    numbers, rest = run.groups()
    if rest.lstrip().startswith(":"):
        return numbers, rest.lstrip()[1:]
    if not rest.strip():
        raise InputError(f'"{_short(text)}" has no prompt: write "{_short(numbers)}: PROMPT"')
    time, _, first = numbers.rpartition(":")
    if _is_clock(numbers) and not rest[0].isalnum():
        raise InputError(
            f'"{_short(text)}" can be read in two ways: write "{numbers}: {rest.strip()[:20]}"'
            f' for a prompt at {numbers}, or "{time}: {first}{rest[:20]}" for one at {time}'
        )
    return time, first + rest


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def _is_clock(word: str) -> bool:
    try:
        _clock(word)
    except InputError:
        return False
    return True


def _clock(word: str) -> float:
    found = _CLOCK.fullmatch(word)
    if found is None:
        raise InputError(f'"{_short(word)}" is no time: write {FORMS}, such as 1:30 or 1:02:30.5')
    hours, minutes, seconds = found.groups()
    parts = {"seconds": float(seconds.replace(",", "."))}
    if hours is not None:
        parts["minutes"] = float(minutes)
    for name, value in parts.items():
        if value >= 60:
            raise InputError(f'"{_short(word)}" is no time: its {name} must be below 60')
    return 3600.0 * float(hours or 0) + 60.0 * float(minutes) + parts["seconds"]


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."
