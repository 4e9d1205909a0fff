"""Cases of a test that are many, and are asked for by `-m every_shape`."""

from collections.abc import Iterable

import pytest


def every_shape(cases: Iterable[str | tuple]) -> list:
    """They may also be among those that always run."""
    arguments = (case if isinstance(case, tuple) else (case,) for case in cases)
    return [pytest.param(*x, marks=pytest.mark.every_shape) for x in arguments]
