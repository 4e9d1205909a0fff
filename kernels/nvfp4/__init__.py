"""Four-bit floats in blocks of 16: the format, the quantiser, products, and a linear layer."""

from longlive_kernels.nvfp4.format import NVFP4, RULES, Rule

__all__ = ["NVFP4", "RULES", "Rule"]
