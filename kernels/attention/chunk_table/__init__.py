"""Attention under a static table over latent frames, for training and recaching; see api.py."""

from longlive_kernels.attention.chunk_table.api import chunk_table
from longlive_kernels.attention.chunk_table.table import Table

__all__ = ["Table", "chunk_table"]
