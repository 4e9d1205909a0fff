"""Packages that results are compared with: those of the [parity] extra."""

import importlib
from typing import Any

import pytest

REASON = "needs the [parity] extra: pip install '.[parity]'"


class Missing:
    """What stands for a package that is not installed: a test that uses it is skipped."""

    def __getattr__(self, name: str) -> Any:
        pytest.skip(REASON)


def optional(name: str) -> Any:
    """The module, or `Missing`, which leaves the other tests of a file to run."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return Missing()


def needed(*names: str) -> Any:
    """The modules, one or a tuple; skips what cannot do without."""
    found = tuple(pytest.importorskip(name, reason=REASON, exc_type=ImportError) for name in names)
    return found if len(found) > 1 else found[0]
