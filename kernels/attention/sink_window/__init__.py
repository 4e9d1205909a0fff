"""Attention of a chunk over a table of slots, for streaming and recaching; see api.py."""

from longlive_kernels.attention.sink_window.api import sink_window
from longlive_kernels.attention.sink_window.call import Order
from longlive_kernels.attention.sink_window.kept import Fresh, Scaled

__all__ = ["Fresh", "Order", "Scaled", "sink_window"]
