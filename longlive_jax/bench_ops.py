"""The kernels that are measured, as a table: which op, at which shapes, by which backends.

A row is an op of `longlive_kernels`; its shapes and backends are the package's own lists, so what
is added there is measured. What a `Case` counts is the least that the op must do.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from longlive_kernels.eight import eight_bits
from longlive_kernels.nvfp4 import NVFP4
from longlive_kernels.nvfp4.format import BLOCK

PLAIN = {"made of the two": None}  # backends of an op that has none of its own


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape.

    make: operands, of a key. call: a backend and operands → the result. refuse: the same → why it
    cannot run, or None. flops: of matrix products. nbytes: what must be read and written once.
    """

    make: Callable[[Any], tuple]
    call: Callable[..., Any]
    refuse: Callable[..., str | None]
    flops: float
    nbytes: float

    def abstract(self) -> tuple:
        """The operands by shape."""
        return jax.eval_shape(self.make, jax.random.key(0))

    def refusal(self, backend: Any) -> str | None:
        """Why that backend cannot run the case; None if it can."""
        said = []
        jax.eval_shape(lambda *x: said.append(self.refuse(backend, *x)), *self.abstract())
        return said[0]


@dataclasses.dataclass(frozen=True)
class Op:
    """A row. package: of its shapes. api: where its backends are listed; None if it has none.
    fits: which shapes are its own. case: of a shape and the type of numbers.
    """

    name: str
    package: str
    case: Callable[[Any, Any], Case]
    api: str | None
    fits: Callable[[str, Any], bool] = lambda name, shape: True

    @property
    def shapes(self) -> dict[str, Any]:
        every = importlib.import_module(f"{self.package}.shapes").SHAPES
        return {name: shape for name, shape in every.items() if self.fits(name, shape)}

    @property
    def backends(self) -> Mapping[str, Any]:
        """The best first."""
        return PLAIN if self.api is None else importlib.import_module(self.api).BACKENDS


def normal(key: Any, shapes: tuple[tuple[int, ...], ...], dtype: Any) -> tuple:
    """Random numbers of these shapes."""
    keys = jax.random.split(key, len(shapes))
    return tuple(jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))


def nvfp4(key: Any, shape: tuple[int, ...]) -> NVFP4:
    """A random quantised matrix, or a stack of them."""
    *stack, rows, columns = shape
    scales = jnp.full((*stack, rows, columns // BLOCK), 64, jnp.float8_e4m3fn)
    packed = jax.random.bits(key, (*stack, rows, columns // 2), jnp.uint8)
    return NVFP4(packed, scales, jnp.ones(tuple(stack)), "mse")


def size(shape: tuple[int, ...], dtype: Any) -> float:
    """Bytes; `dtype` NVFP4 counts values and scales."""
    each = 0.5 + 1 / BLOCK if dtype is NVFP4 else jnp.dtype(dtype).itemsize
    return float(math.prod(shape) * each)


def both(run: Callable, operands: tuple, grad: Any) -> tuple:
    """What `run` makes, and its gradient. A step of training needs both; what nobody asks for, XLA
    leaves out.
    """
    out, back = jax.vjp(run, *operands)
    return out, back(grad)


def chunk_table(shape: Any, dtype: Any, *, gradient: bool = False) -> Case:
    """Training attention; or the same and its gradient."""
    shapes = (shape.queries, shape.keys, shape.keys) + (shape.queries,) * gradient
    pairs = float(shape.table.array.sum()) * shape.tokens**2 * shape.batch

    def call(backend, q, k, v, *grad):
        attend = lambda q, k, v: backend.attend(q, k, v, shape.table)  # noqa: E731
        return both(attend, (q, k, v), *grad) if gradient else attend(q, k, v)

    def refuse(backend, q, k, v, *_):
        return backend.unsupported(q, k, v, shape.table)

    return Case(
        make=lambda key: normal(key, shapes, dtype),
        call=call,
        refuse=refuse,
        # Two products forward, five for the gradient (arXiv 2307.08691 section 3.1).
        flops=4.0 * shape.heads * shape.width * pairs * (3.5 if gradient else 1),
        nbytes=(2 if gradient else 1) * 2 * (size(shape.queries, dtype) + size(shape.keys, dtype)),
    )


def quantize(shape: Any, dtype: Any) -> Case:
    """The largest magnitude is found first, as for who calls the op."""
    from longlive_kernels.nvfp4.quantize import largest

    how = dict(tile=shape.tile, transpose=shape.transpose)

    def options(x, signs):
        signs = signs if shape.rotate else None
        amax = largest(x, transpose=shape.transpose, signs=signs)
        return dict(rule="mse", signs=signs, draws=None, amax=amax) | how

    def call(backend, x, signs):
        return backend.quantize(x, **options(x, signs))

    def refuse(backend, x, signs):
        return backend.unsupported(x, **options(x, signs))

    def make(key):
        return *normal(key, (shape.x,), dtype), jax.random.rademacher(key, (BLOCK,), jnp.float32)

    return Case(make, call, refuse, 0.0, size(shape.x, dtype) + size(shape.x, NVFP4))


def matmul(shape: Any, dtype: Any, *, mixed: bool = False) -> Case:
    """mixed: one operand is as it is (W4A16)."""
    name = "matmul_w4a16" if mixed else "matmul"

    def make(key):
        one, two = jax.random.split(key)
        a = normal(one, (shape.a,), dtype)[0] if mixed else nvfp4(one, shape.a)
        return a, nvfp4(two, shape.b)

    def call(backend, a, b):
        return getattr(backend, name)(a, b, dtype)

    def refuse(backend, a, b):
        return backend.unsupported(a, b, dtype)

    out = (*shape.batch, shape.m, shape.n)
    read = size(shape.a, dtype if mixed else NVFP4) + size(shape.b, NVFP4)
    flops = 2.0 * math.prod(shape.batch) * shape.m * shape.n * shape.k
    return Case(make, call, refuse, flops, read + size(out, dtype))


def linear(shape: Any, dtype: Any, *, gradient: bool = False) -> Case:
    """A layer of NVFP4 training over a kernel in float32; or the same and its gradient."""
    from longlive_kernels.nvfp4.linear import linear as layer

    def make(key):
        one, two = jax.random.split(key)
        kernel = normal(two, ((shape.k, shape.n),), jnp.float32)
        return normal(one, (shape.a, (shape.m, shape.n))[: 1 + gradient], dtype) + kernel

    def call(backend, x, *rest):
        *grad, kernel = rest
        run = lambda x, kernel: layer(x, kernel, jax.random.key(0))  # noqa: E731
        return both(run, (x, kernel), *grad) if gradient else run(x, kernel)

    kernel, out = (shape.k, shape.n), (shape.m, shape.n)
    nbytes = size(shape.a, dtype) + size(kernel, jnp.float32) + size(out, dtype)
    flops = 2.0 * shape.m * shape.n * shape.k
    if gradient:  # three products; with the output's, as many numbers again
        flops, nbytes = 3 * flops, 2 * nbytes
    return Case(make, call, lambda *_: None, flops, nbytes)


def sink_window(
    shape: Any,
    dtype: Any,
    *,
    kind: Any = None,
    multiplied: bool = False,
    beside: bool = False,
) -> Case:
    """Attention of a chunk over a slot table of several layers. Its places, what is seen, the layer
    and the chunk's own slots, are operands, as in a model: of constants XLA makes other programs.

    kind: of slots, int8, e4m3 or NVFP4, with the chunk's own frames as they are; None: the type of
    the model. multiplied: keys are, as they are kept. beside: the chunk's own frames are beside the
    table, as for every kind.
    """
    from longlive_kernels.attention.sink_window.call import Call
    from longlive_kernels.attention.sink_window.kept import Fresh, Scaled

    rows, _, slots = shape.table.shape
    *lead, tokens, heads, width = shape.keys
    phases = (rows, slots, shape.turned)
    own = (rows, len(shape.own), tokens, heads, width)
    beside = beside or kind is not None

    def table(key: Any) -> Any:
        """Of eight bits the parts: arrays alone have an abstract form."""
        if kind is NVFP4:
            return nvfp4(key, (*lead, tokens * heads, width))
        (x,) = normal(key, (shape.keys,), dtype)
        return x if kind is None else eight_bits(x, kind, -1)

    def make(key):
        more = (phases,) if shape.relative else ()
        fresh = (own, own) if beside else ()
        keys = jax.random.split(key, 3)
        q, *rest = normal(keys[0], (shape.queries, *fresh, *more), dtype)
        new, turns = (q, *rest[: len(fresh)]), rest[len(fresh) :]
        slots = jnp.broadcast_to(jnp.array(shape.own, jnp.int32), own[:2])
        places = jnp.asarray(shape.asked), jnp.int32(shape.layers - 1), slots
        return new, (table(keys[1]), table(keys[2])), places, turns

    def asked(new, memory, places, turns):
        (q, *pair), (k, v), (visible, layer, slots) = new, memory, places
        if isinstance(k, tuple):
            k, v = (Scaled(values, scales[..., 0]) for values, scales in (k, v))
            k = dataclasses.replace(k, multiplied=multiplied)
        read = turns[0].astype(jnp.float32) if turns else None
        fresh = Fresh(*pair, slots) if pair else None
        return Call(q, k, v, visible, layer, read, fresh, shape.order)

    return Case(
        make=make,
        call=lambda backend, *x: backend.attend(asked(*x)),
        refuse=lambda backend, *x: backend.unsupported(asked(*x)),
        flops=float(shape.flops),
        nbytes=2 * (size(shape.queries, dtype) + _window(shape, dtype, kind, beside)),
    )


def _window(shape: Any, dtype: Any, kind: Any, beside: bool) -> float:
    """Bytes of the keys that are seen, of slots and of what is beside them."""
    seen, own = shape.table.any(1), list(shape.own)
    fresh = int(seen[:, own].sum()) if beside else 0
    each = shape.keys[3:]  # s a d
    slots = (int(seen.sum()) - fresh, *each)
    # Of eight bits with a scale for each token and head.
    scales = 0.0 if kind in (None, NVFP4) else size(slots[:-1], jnp.float32)
    return size(slots, kind or dtype) + scales + size((fresh, *each), dtype)


def sink_window_gradient(shape: Any, dtype: Any) -> Case:
    """The same, and its gradient in queries and in the chunk's own frames; the memory has none."""
    ahead = sink_window(shape, dtype, beside=True)
    own = (shape.keys[1], len(shape.own), *shape.keys[3:])

    def make(key):
        one, other = jax.random.split(key)
        return *ahead.make(one), *normal(other, (shape.queries,), dtype)

    def call(backend, new, *given):
        *rest, grad = given
        return both(lambda new: ahead.call(backend, new, *rest), (new,), grad)

    # Scores again, the gradient of weights and of queries; of own frames two products more.
    seen = float(shape.table[:, :, list(shape.own)].sum()) / max(shape.pairs, 1)
    return Case(
        make=make,
        call=call,
        refuse=lambda backend, *x: ahead.refuse(backend, *x[:-1]),
        flops=(2.5 + seen) * ahead.flops,
        nbytes=ahead.nbytes + 2 * (size(shape.queries, dtype) + size(own, dtype)),
    )


def _as_kept(name: str, shape: Any) -> bool:
    return not shape.relative


def _one_matrix(name: str, shape: Any) -> bool:
    return not shape.batch


def _layer(name: str, shape: Any) -> bool:
    """A whole layer, not the products of its gradient; sides are whole blocks."""
    blocks = shape.n % BLOCK == 0 and shape.k % BLOCK == 0
    return not name.endswith(("_dgrad", "_wgrad")) and not shape.batch and blocks


# How slots are kept in fewer bits; with what is called scores they are multiplied so, too.
SLOTS = {
    "int8": jnp.int8,
    "int8 scores": jnp.int8,
    "fp8": jnp.float8_e4m3fn,
    "fp8 scores": jnp.float8_e4m3fn,
    "nvfp4": NVFP4,
}
_ATTENTION, _NVFP4 = "longlive_kernels.attention", "longlive_kernels.nvfp4"
_TABLE, _PRODUCT = f"{_ATTENTION}.chunk_table", f"{_NVFP4}.matmul"
_SLOTS, _QUANTISER = f"{_ATTENTION}.sink_window", f"{_NVFP4}.quantize"

OPS = {
    op.name: op
    for op in (
        Op("attention/chunk_table", _TABLE, chunk_table, f"{_TABLE}.api"),
        Op(
            "attention/chunk_table gradient",
            _TABLE,
            functools.partial(chunk_table, gradient=True),
            f"{_TABLE}.api",
        ),
        Op("attention/sink_window", _SLOTS, sink_window, f"{_SLOTS}.api"),
        Op("attention/sink_window gradient", _SLOTS, sink_window_gradient, f"{_SLOTS}.api"),
        *(
            Op(
                f"attention/sink_window {name}",
                _SLOTS,
                functools.partial(sink_window, kind=kind, multiplied="scores" in name),
                f"{_SLOTS}.api",
                *([_as_kept] if "scores" in name else []),
            )
            for name, kind in SLOTS.items()
        ),
        Op("nvfp4/quantize", _QUANTISER, quantize, f"{_QUANTISER}.api"),
        Op("nvfp4/matmul", _PRODUCT, matmul, f"{_PRODUCT}.api"),
        Op(
            "nvfp4/matmul_w4a16",
            _PRODUCT,
            functools.partial(matmul, mixed=True),
            f"{_PRODUCT}.api",
            _one_matrix,
        ),
        Op("nvfp4/linear", _PRODUCT, linear, None, _layer),
        Op(
            "nvfp4/linear gradient",
            _PRODUCT,
            functools.partial(linear, gradient=True),
            None,
            _layer,
        ),
    )
}
