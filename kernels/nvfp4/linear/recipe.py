"""How a linear layer is quantised, as a value, and what chance decides in it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from longlive_kernels.nvfp4.format import BLOCK, RULES


@dataclasses.dataclass(frozen=True)
class Recipe:
    """weights, activations, gradients: names in `RULES`. tile: rows of weights that share a scale,
    1 or 16. stochastic: how gradients are rounded. hadamard: whether what makes the gradient of
    weights is rotated.
    """

    weights: str = "static_6"
    activations: str = "mse"
    gradients: str = "mse"
    tile: int = 16
    stochastic: bool = True
    hadamard: bool = True


@dataclasses.dataclass(frozen=True)
class Chance:
    """signs: of the rotation. dgrad, wgrad: what rounds gradients of outputs in either product, as
    `quantize` takes it: `key` or `draws`, or neither for the nearest.
    """

    signs: Float[Array, " 16"] | None = None
    dgrad: dict[str, Array] = dataclasses.field(default_factory=dict)
    wgrad: dict[str, Array] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, key: Array, recipe: Recipe, tokens: Int[Array, " t"], outputs: int) -> Chance:
        """tokens: which one each row is. A row that is filled up has any."""
        signs, dgrad, wgrad = (jax.random.fold_in(key, i) for i in range(3))
        signs = jax.random.rademacher(signs, (BLOCK,), jnp.float32) if recipe.hadamard else None
        if not recipe.stochastic:
            return cls(signs)
        count = RULES[recipe.gradients].candidates
        filled = jnp.pad(tokens, (0, -len(tokens) % BLOCK), constant_values=-1)
        return cls(
            signs,
            dict(draws=of_tokens(dgrad, tokens, (count, outputs))),
            dict(draws=of_tokens(wgrad, filled, (count, outputs)).mT),
        )


def of_tokens(
    key: Array, tokens: Int[Array, " t"], shape: tuple[int, int]
) -> Float[Array, "k t n"]:
    """Draws of each token, wherever it lies and whatever is beside it."""
    draw = lambda token: jax.random.uniform(jax.random.fold_in(key, token), shape)  # noqa: E731
    return jnp.moveaxis(jax.vmap(draw)(tokens), 0, 1)
