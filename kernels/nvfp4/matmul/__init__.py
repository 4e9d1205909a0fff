"""Products with NVFP4 matrices; see api.py."""

from longlive_kernels.nvfp4.matmul.api import matmul, matmul_w4a16

__all__ = ["matmul", "matmul_w4a16"]
