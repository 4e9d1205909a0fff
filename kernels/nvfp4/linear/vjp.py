"""The layer over a matrix of tokens, and its gradient: three products of quantised operands."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from longlive_kernels.nvfp4.format import BLOCK, NVFP4
from longlive_kernels.nvfp4.linear.recipe import Chance, Recipe
from longlive_kernels.nvfp4.matmul import matmul
from longlive_kernels.nvfp4.quantize import dequantize, quantize

Tokens = Float[Array, "t k"]
Kernel = Float[Array, "k n"]
Grad = Float[Array, "t n"]
Pair = tuple[NVFP4, NVFP4]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear(x: Tokens, kernel: Kernel, key: Array, tokens: Array, recipe: Recipe) -> Grad:
    """x · kernel, in the type of x."""
    return matmul(*fprop(x, kernel, recipe), dtype=x.dtype)


def _save(x, kernel, key, tokens, recipe):
    operands = fprop(x, kernel, recipe)
    return matmul(*operands, dtype=x.dtype), (_bytes(operands[0]), kernel, key, tokens)


def _backward(recipe, saved, grad):
    x, kernel, key, tokens = saved
    x = _bytes(x, jnp.float8_e4m3fn)
    chance = Chance.of(key, recipe, tokens, grad.shape[-1])
    return *gradients(x, kernel, grad, chance, recipe), None, None


linear.defvjp(_save, _backward)


def _bytes(x: NVFP4, dtype=jnp.uint8) -> NVFP4:
    """With scales as bytes, or these as `dtype`. What `jax.checkpoint` keeps it rounds to its own
    type, and that of e4m3fn as if it had infinities: 256 to 448 would come back as NaN.
    """
    return dataclasses.replace(x, scales=jax.lax.bitcast_convert_type(x.scales, dtype))


def gradients(
    x: NVFP4, kernel: Kernel, grad: Grad, chance: Chance, recipe: Recipe
) -> tuple[Tokens, Kernel]:
    """Of x, in the type of `grad`, and of kernel, in its own."""
    dx = matmul(*dgrad(kernel, grad, chance, recipe), dtype=grad.dtype)
    return dx, matmul(*wgrad(x, grad, chance, recipe), dtype=kernel.dtype)


def fprop(x: Tokens, kernel: Kernel, recipe: Recipe) -> Pair:
    """t k and n k."""
    weights = quantize(kernel, rule=recipe.weights, tile=recipe.tile, transpose=True)
    return quantize(x, rule=recipe.activations), weights


def dgrad(kernel: Kernel, grad: Grad, chance: Chance, recipe: Recipe) -> Pair:
    """t n and k n. Weights are quantised anew: where scales do not cover tiles, they differ."""
    weights = quantize(kernel, rule=recipe.weights, tile=recipe.tile)
    return quantize(grad, rule=recipe.gradients, **chance.dgrad), weights


def wgrad(x: NVFP4, grad: Grad, chance: Chance, recipe: Recipe) -> Pair:
    """k t and n t, t filled up to blocks with zeros. x is quantised a second time, now along
    tokens, from what the type of `grad` makes of its first.
    """
    operand = functools.partial(quantize, transpose=True, signs=chance.signs)
    x = operand(_filled(dequantize(x, grad.dtype)), rule=recipe.activations)
    return x, operand(_filled(grad), rule=recipe.gradients, **chance.wgrad)


def _filled(x: Float[Array, "t c"]) -> Float[Array, "t2 c"]:
    return jnp.pad(x, ((0, -x.shape[0] % BLOCK), (0, 0)))
