"""Attention under a static table over latent frames, for training and recaching; see api.py."""

from longlive_kernels.attention.chunk_table.api import chunk_table
from longlive_kernels.attention.chunk_table.table import Table
from longlive_kernels.attention.chunk_table.xla import unmasked

__all__ = ["Table", "chunk_table", "unmasked"]
