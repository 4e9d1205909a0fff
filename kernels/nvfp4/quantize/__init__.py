"""Quantising matrices to NVFP4 and back; see api.py."""

from longlive_kernels.nvfp4.quantize.api import dequantize, largest, quantize

__all__ = ["dequantize", "largest", "quantize"]
