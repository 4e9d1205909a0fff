"""The same causal convolution in several ways: in which layout, and as which convolutions of XLA's.
Part of `longlive bench --suite vae`.

On a GPU the algorithm beneath each is chosen by XLA, which tries those of cuDNN as it compiles.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from longlive_jax import report
from longlive_jax.bench_session import timed
from longlive_jax.vae.layers import conv2d, taps

SIDE = 3  # of the neighbourhood, in space and in time
SAME = ((1, 1), (1, 1))
Input = Float[Array, "b t h w i"]  # with the two frames before it
Kernel = Float[Array, "3 3 3 i o"]  # frames, oldest first; height; width


@dataclasses.dataclass(frozen=True)
class Way:
    """given: the operands as it takes them, made beforehand. run: of these, the result; `axes` are
    the result's, in einops' words.
    """

    given: Callable[[Input, Kernel], tuple[Array, Array]]
    run: Callable[[Array, Array], Array]
    axes: str = "b t h w o"

    def __call__(self, x: Input, kernel: Kernel) -> Float[Array, "b f h w o"]:
        return rearrange(self.run(*self.given(x, kernel)), f"{self.axes} -> b t h w o")


def _convolved(x: Array, kernel: Array, letters: tuple[str, str, str], padding: Any) -> Array:
    strides = (1,) * (x.ndim - 2)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=letters)


def _side_by_side(x: Array, kernel: Array) -> Array:
    return conv2d(taps(x, SIDE), kernel, None)


def _summed(x: Array, kernel: Array) -> Array:
    count = x.shape[1] - SIDE + 1
    return sum(conv2d(x[:, i : i + count], kernel[i], None) for i in range(SIDE))


def _side_by_side_first(x: Array, kernel: Array) -> Array:
    """x: t b i h w, for which time taps are slices of the leading axis."""
    count = x.shape[0] - SIDE + 1
    x = jnp.concatenate([x[i : i + count] for i in range(SIDE)], 2)
    y = _convolved(x.reshape(-1, *x.shape[2:]), kernel, ("NCHW", "OIHW", "NCHW"), SAME)
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _whole(letters: tuple[str, str, str]) -> Callable[[Array, Array], Array]:
    return lambda x, kernel: _convolved(x, kernel, letters, ((0, 0), *SAME))


WAYS = {
    # A 2-D convolution with time in the channels, as `vae.layers.CausalConv` is.
    "taps": Way(lambda x, k: (x, rearrange(k, "t h w i o -> h w (t i) o")), _side_by_side),
    # One for each tap, added up.
    "sum": Way(lambda x, k: (x, k), _summed),
    "3-D": Way(lambda x, k: (x, k), _whole(("NDHWC", "DHWIO", "NDHWC"))),
    "taps NCHW": Way(
        lambda x, k: (
            rearrange(x, "b t h w i -> t b i h w"),
            rearrange(k, "t h w i o -> o (t i) h w"),
        ),
        _side_by_side_first,
        "t b o h w",
    ),
    "3-D NCDHW": Way(
        lambda x, k: (
            rearrange(x, "b t h w i -> b i t h w"),
            rearrange(k, "t h w i o -> o i t h w"),
        ),
        _whole(("NCDHW", "OIDHW", "NCDHW")),
        "b o t h w",
    ),
}


def measured(x: jax.ShapeDtypeStruct, repeat: int) -> dict[str, float]:
    """Median seconds of each way that there is room for, of as many channels as x has, which is
    b t h w c.
    """
    batch, frames, *rest = x.shape
    one, two = jax.random.split(jax.random.key(0))
    given = (
        jax.random.normal(one, (batch, frames + SIDE - 1, *rest), x.dtype),
        jax.random.normal(two, (SIDE,) * 3 + 2 * (rest[-1],), x.dtype),
    )
    programs = {}
    for name, way in WAYS.items():
        operands = jax.block_until_ready(jax.jit(way.given)(*given))
        program = jax.jit(way.run).lower(*operands).compile()
        try:
            report.check_room(program)
        except MemoryError:
            continue
        programs[name] = lambda run=program, x=operands: jax.block_until_ready(run(*x))
    for run in programs.values():
        run()
    # In turns: what else the machine does falls on all of them.
    turns = [{name: timed(run) for name, run in programs.items()} for _ in range(repeat)]
    return {name: statistics.median(turn[name] for turn in turns) for name in programs}
