"""The layers that the transformer and the text encoder share."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@functools.singledispatch
def product(kernel: Any, x: jax.Array) -> jax.Array:
    """x @ kernel over the last axis. A way of storing weights (low-rank, low-bit) is a type of its
    own, and registers its own product here.
    """
    return jnp.einsum("...i,io->...o", x, kernel)


def linear(x: jax.Array, kernel: Any, bias: jax.Array | None = None) -> jax.Array:
    """x @ kernel + bias over the last axis, the kernel stored in any way that has a `product`."""
    y = product(kernel, x)
    return y if bias is None else y + bias


class Linear(nnx.Module):
    """Affine map of the last axis. `scale` multiplies the Glorot-like initial kernel."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = True, scale: float = 1.0, rngs: nnx.Rngs
    ):
        init = jax.nn.initializers.variance_scaling(max(scale, 1e-12) ** 2, "fan_in", "normal")
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return linear(x, self.kernel[...], None if self.bias is None else self.bias[...])


class RMSNorm(nnx.Module):
    """Root-mean-square norm of the last axis, in float32, times a learned scale
    (`model.py:WanRMSNorm`).
    """

    def __init__(self, dim: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones(dim))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale[...]


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """LayerNorm without learned parameters, in float32."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm with learned scale and bias."""

    def __init__(self, dim: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones(dim))
        self.bias = nnx.Param(jnp.zeros(dim))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.eps) * self.scale[...] + self.bias[...]
