"""LongLive-JAX: real-time, interactive, minutes-long video generation, and the training behind it.

import longlive_jax

model = longlive_jax.load("tiny")
session = model.session("a red circle moves left over a black background")
chunk = session.next_chunk()  # uint8 [t, H, W, 3]
session.switch("a blue circle moves left over a black background")
frames = [frame for chunk in session.stream(seconds=10) for frame in chunk]
"""

from __future__ import annotations

import importlib
from typing import Any

from longlive_jax import cpu_devices
from longlive_jax.version import __version__

cpu_devices.reserve_threads()  # before a device is used

_HOMES = {
    "Batch": "longlive_jax.batch",
    "Chunk": "longlive_jax.session",
    "Event": "longlive_jax.events",
    "InputError": "longlive_jax.errors",
    "Model": "longlive_jax.model",
    "NotFiniteError": "longlive_jax.errors",
    "Receipt": "longlive_jax.session",
    "Recache": "longlive_jax.config",
    "Session": "longlive_jax.session",
    "SessionError": "longlive_jax.errors",
    "load": "longlive_jax.model",
    "restore": "longlive_jax.saved",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Imports on first use: the command line answers bad input before JAX is loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
