"""How a part reports to the process that started it: JSON lines, one when an entry begins and one
when it ends.

A line is in the file as soon as it is written, so that results stay when the part dies later.
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
    """An entry that cannot be measured here; the message is the reason."""


class Wrong(Exception):
    """An entry that ran to its end with a wrong result.

    Args:
      why: One sentence.
      facts: What was measured.
    """

    def __init__(self, why: str, facts: dict[str, Any]):
        super().__init__(why)
        self.facts = facts


def each(
    results: pathlib.Path, entries: Sequence[str], measure: Callable[[str], dict[str, Any]]
) -> None:
    """Measures one entry after the other.

    After an error the next entry follows, unless the device no longer works: then the process
    exits, and the process that started it continues with a new one.

    Args:
      results: The file to which lines are appended.
      entries: Names of what to measure.
      measure: A function of such a name that returns the facts to report.
    """
    with results.open("a", encoding="utf-8") as file:
        for entry in entries:
            _write(file, entry, state="begun")
            try:
                facts = measure(entry)
            except Skipped as reason:
                _write(file, entry, state="skipped", why=str(reason))
            except Wrong as error:
                _write(file, entry, state="failed", why=str(error), **error.facts)
            except Exception as error:  # noqa: BLE001  # reported for this entry; others follow
                sys.stderr.write(traceback.format_exc())
                why = f"{type(error).__name__}: {error}"
                _write(file, entry, state="failed", why="\n".join(why.splitlines()[:4]))
                _check_device()
            else:
                _write(file, entry, state="ok", **facts)


def _write(file: Any, entry: str, **facts: Any) -> None:
    file.write(json.dumps(_finite({"entry": entry, **facts}), allow_nan=False) + "\n")
    file.flush()


def _finite(value: Any) -> Any:
    """Replaces floats that JSON cannot hold (NaN, infinities) by their names."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _check_device() -> None:
    """Exits where the device no longer works, as after an illegal access in a kernel."""
    try:
        jax.block_until_ready(jax.numpy.zeros(8) + 1)
    except Exception as error:  # noqa: BLE001  # any error means that
        sys.exit(f"the device is lost: {error}")
