"""The gradient of what has none of its own: that of something that means the same, which makes
everything anew from the operands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float
from longlive_kernels.attention.sink_window.call import Call

Attend = Callable[[Call], Float[Array, "b n a d"]]


def differentiable(forward: Attend, again: Attend) -> Attend:
    """`forward`, with the gradient of `again`. Nothing is kept for it but the call."""

    def attend(call: Call) -> Float[Array, "b n a d"]:
        leaves, tree = jax.tree.flatten(call)
        return _attend(leaves, tree, forward, again)

    return attend


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _attend(
    leaves: list[Array], tree: Any, forward: Attend, again: Attend
) -> Float[Array, "b n a d"]:
    return forward(tree.unflatten(leaves))


def _save(
    leaves: list[Array], tree: Any, forward: Attend, again: Attend
) -> tuple[Array, list[Array]]:
    return _attend(leaves, tree, forward, again), leaves


def _backward(
    tree: Any, forward: Attend, again: Attend, leaves: list[Array], grad: Array
) -> tuple[list[Any]]:  # those of whole numbers are numpy's float0
    return jax.vjp(lambda leaves: again(tree.unflatten(leaves)), leaves)[1](grad)


_attend.defvjp(_save, _backward)
