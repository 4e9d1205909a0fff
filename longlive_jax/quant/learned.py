"""Training with NVFP4 products: a leaf type that a step puts in the place of a float32 kernel
(LongLive 2.0 section 2.2; `trainer/`, `utils/quant.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key
from longlive_kernels.nvfp4.linear import Recipe, linear

from longlive_jax import layers
from longlive_jax.config import Precision
from longlive_jax.quant.transformer import SUFFIX, kinds
from longlive_jax.train.order import Order

TEXT = ("blocks.cross_attn.k", "blocks.cross_attn.v")  # what they see is not in a video's order


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel", "keys"],
    meta_fields=["recipe", "order"],
)
@dataclasses.dataclass(frozen=True)
class Learned:
    """kernel: *layers in out, float32. keys: *layers b, of each video. order: in which a video's
    tokens lie, None for the order in which they count.
    """

    kernel: Any
    keys: Any
    recipe: Recipe
    order: Order | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    def __getitem__(self, index: Any) -> Learned:
        return jax.tree.map(lambda x: x[index], self)

    def tokens(self, count: int) -> Int[Array, " n"]:
        """Which token of the video each is."""
        if self.order is None:
            return jnp.arange(count, dtype=jnp.int32)
        clean, noisy = jnp.arange(count, dtype=jnp.int32).reshape(2, 1, -1)
        return self.order.join(clean, noisy)[0]


@layers.product.register(Learned)
def _(kernel: Learned, x: jax.Array) -> jax.Array:
    """Each video is quantised by itself, with chances of its own: the same whatever is beside it,
    and on whichever devices it lies. LongLive 2.0 has one video on each group of ranks.
    """
    rows = x.reshape(x.shape[0], -1, x.shape[-1]) if x.ndim > 3 else x  # b n in
    tokens = kernel.tokens(rows.shape[1])
    one = lambda x, key: linear(x, kernel.kernel, key, kernel.recipe, tokens)  # noqa: E731
    return jax.vmap(one)(rows, kernel.keys).reshape(*x.shape[:-1], -1)


def learn(
    flat: dict[str, Array], recipe: Recipe, keys: Key[Array, " b"], order: Order
) -> dict[str, Any]:
    """The blocks' linear kernels of flat weights, with NVFP4 products. keys: of each video; every
    layer has others made of them.
    """
    made = {}
    for number, path in enumerate(kinds(Precision.of("nvfp4"))):
        kernel = flat[path + SUFFIX]
        count = number * kernel.shape[0] + jnp.arange(kernel.shape[0])  # layers in out
        each = jax.vmap(lambda n: jax.vmap(lambda key: jax.random.fold_in(key, n))(keys))(count)
        own = None if path in TEXT else order
        made[path + SUFFIX] = Learned(kernel.astype(jnp.float32), each, recipe, own)
    return made
