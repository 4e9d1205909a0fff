"""What a part tells the process that started it: a line of JSON for each of its entries.

Lines are in the file as soon as an entry has ended, so that what stops the part later takes nothing
away from those before.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax


class Skipped(Exception):
    """An entry that has no meaning here, and the reason."""


class Wrong(Exception):
    """An entry that ran to its end with a result that must not be.

    Args:
      why: One sentence.
      facts: What was measured all the same.
    """

    def __init__(self, why: str, facts: dict[str, Any]):
        super().__init__(why)
        self.facts = facts


def each(
    results: pathlib.Path, entries: Sequence[str], measure: Callable[[str], dict[str, Any]]
) -> None:
    """Measures one entry after the other.

    An error is the entry's own, and the next one follows, unless the device is lost with it: then
    the process ends, and who started it goes on with another.

    Args:
      results: The file to which lines are added.
      entries: What to measure.
      measure: Of an entry, what is to be reported of it.
    """
    with results.open("a", encoding="utf-8") as file:
        for entry in entries:
            _say(file, entry, state="begun")
            try:
                facts = measure(entry)
            except Skipped as reason:
                _say(file, entry, state="skipped", why=str(reason))
            except Wrong as error:
                _say(file, entry, state="failed", why=str(error), **error.facts)
            except Exception as error:  # noqa: BLE001  # of one entry: a line, not the end
                sys.stderr.write(traceback.format_exc())
                why = f"{type(error).__name__}: {error}"
                _say(file, entry, state="failed", why="\n".join(why.splitlines()[:4]))
                _check_device()
            else:
                _say(file, entry, state="ok", **facts)


def _say(file: Any, entry: str, **facts: Any) -> None:
    file.write(json.dumps(_finite({"entry": entry, **facts}), allow_nan=False) + "\n")
    file.flush()


def _finite(value: Any) -> Any:
    """The same with the names of floats for which JSON has no number."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _check_device() -> None:
    """Ends the process where nothing runs any more: after an error in a kernel, nothing does."""
    try:
        jax.block_until_ready(jax.numpy.zeros(8) + 1)
    except Exception as error:  # noqa: BLE001  # whatever it is, the device is lost
        sys.exit(f"the device is lost: {error}")
