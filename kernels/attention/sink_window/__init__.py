"""Attention of a chunk over a table of slots, for streaming and recaching; see api.py."""

from longlive_kernels.attention.sink_window.api import sink_window
from longlive_kernels.attention.sink_window.kept import Fresh, Scaled

__all__ = ["Fresh", "Scaled", "sink_window"]
