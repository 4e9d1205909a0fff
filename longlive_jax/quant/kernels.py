"""Kernels in eight and in four bits: leaf types in the place of an array, each with its product.

x W is computed in that precision too ("W8A8", "W4A4"): what comes in is quantised on the way, in
the type of the kernel. `weights_only` leaves it as it is, and the kernel is unpacked for the
product.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from longlive_kernels.eight import eight_bits
from longlive_kernels.nvfp4 import NVFP4
from longlive_kernels.nvfp4.matmul import matmul, matmul_w4a16
from longlive_kernels.nvfp4.quantize import dequantize, quantize

from longlive_jax import layers
from longlive_jax.config import Precision


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["weights_only"]
)
@dataclasses.dataclass(frozen=True)
class EightBit:
    """values: *layers in out, int8 or e4m3. scales: *layers 1 out, float32."""

    values: Any
    scales: Any
    weights_only: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __getitem__(self, index: Any) -> EightBit:
        return jax.tree.map(lambda x: x[index], self)

    def dense(self) -> Float[Array, "*layers in out"]:
        return self.values.astype(jnp.float32) * self.scales


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "scales", "amax"],
    meta_fields=["rule", "weights_only"],
)
@dataclasses.dataclass(frozen=True)
class FourBit:
    """NVFP4 of the transposed kernel, *layers out in, in blocks along `in`, which a product sums
    over. rule: of the kernel's scales; those of what comes in are chosen by "mse", as LongLive 2.0
    infers.
    """

    packed: Any  # *layers out in/2
    scales: Any  # *layers out in/16
    amax: Any  # *layers
    rule: str
    weights_only: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, out, half = self.packed.shape
        return (*stack, 2 * half, out)

    def __getitem__(self, index: Any) -> FourBit:
        return jax.tree.map(lambda x: x[index], self)

    @property
    def matrices(self) -> NVFP4:
        return NVFP4(self.packed, self.scales, self.amax, self.rule)

    def dense(self) -> Float[Array, "*layers in out"]:
        return jnp.swapaxes(dequantize(self.matrices), -1, -2)


Kernel = EightBit | FourBit
TYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def make(kernel: Float[Array, "*layers in out"], kind: str, how: Precision) -> Kernel:
    """A kernel in int8, fp8 or nvfp4."""
    if kind in TYPES:
        return EightBit(*eight_bits(kernel, TYPES[kind], -2), how.weights_only)
    q = quantize(jnp.swapaxes(kernel, -1, -2), rule=how.rule, tile=how.tile)
    return FourBit(q.packed, q.scales, q.amax, q.rule, how.weights_only)


def _straight(product: Callable[[Kernel, Array], Array]) -> Callable[[Kernel, Array], Array]:
    """With the gradient that x would have if it were multiplied as it is: rounding has none, and a
    LoRA on matrices in few bits would learn nothing of the layers in front of them.
    """

    @jax.custom_vjp
    def run(kernel: Kernel, x: Array) -> Array:
        return product(kernel, x)

    def save(kernel: Kernel, x: Array) -> tuple[Array, Kernel]:
        return product(kernel, x), kernel

    def back(kernel: Kernel, grad: Array) -> tuple[None, Array]:
        return None, jnp.einsum("...o,io->...i", grad, kernel.dense().astype(grad.dtype))

    run.defvjp(save, back)
    return run


@layers.product.register(EightBit)
@_straight
def _(kernel: EightBit, x: jax.Array) -> jax.Array:
    if kernel.weights_only:
        return layers.product(kernel.dense().astype(x.dtype), x)
    values, scales = eight_bits(x, kernel.values.dtype, -1)  # of each token
    exact = jnp.int32 if kernel.values.dtype == jnp.int8 else jnp.float32
    sums = jnp.einsum("...i,io->...o", values, kernel.values, preferred_element_type=exact)
    return (sums.astype(jnp.float32) * scales * kernel.scales[0]).astype(x.dtype)


@layers.product.register(FourBit)
@_straight
def _(kernel: FourBit, x: jax.Array) -> jax.Array:
    """Each video is quantised by itself: it comes out as it would alone."""
    rows = x.reshape(-1, *x.shape[-2:])  # b n in
    if kernel.weights_only:
        y = matmul_w4a16(rows, kernel.matrices)
    else:
        one = functools.partial(matmul, b=kernel.matrices, dtype=x.dtype)
        y = jax.vmap(lambda video: one(quantize(video, rule="mse")))(rows)
    return y.reshape(*x.shape[:-1], -1)
