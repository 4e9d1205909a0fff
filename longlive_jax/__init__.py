"""LongLive-JAX: real-time, interactive, minutes-long video generation, and the training behind it.

import longlive_jax

model = longlive_jax.load("tiny")
for chunk in model.stream("a red circle moves left over a black background", seconds=10):
    show(chunk.frames)  # uint8 [t, H, W, 3]
"""

from __future__ import annotations

import importlib
from typing import Any

from longlive_jax.version import __version__

_HOMES = {
    "Chunk": "longlive_jax.model",
    "Event": "longlive_jax.events",
    "InputError": "longlive_jax.errors",
    "Model": "longlive_jax.model",
    "load": "longlive_jax.model",
}

__all__ = ["Chunk", "Event", "InputError", "Model", "__version__", "load"]  # noqa: F822


def __getattr__(name: str) -> Any:
    """Imports on first use: the command line answers bad input before JAX is loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
