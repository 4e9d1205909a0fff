"""Cases of a test that are many, and are asked for by `-m long`."""

from collections.abc import Iterable

import pytest


def every_shape(cases: Iterable[str | tuple]) -> list:
    """They may also be among those that always run."""
    arguments = (case if isinstance(case, tuple) else (case,) for case in cases)
    return [pytest.param(*x, marks=pytest.mark.long) for x in arguments]
