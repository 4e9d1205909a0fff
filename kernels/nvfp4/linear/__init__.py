"""A linear layer whose three products are NVFP4; see api.py."""

from longlive_kernels.nvfp4.linear.api import AR, DMD, Recipe, linear

__all__ = ["AR", "DMD", "Recipe", "linear"]
