"""Attention over a table of slots: every backend against the reference, and what it reads."""

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import mosaic_on_cpu
import numpy as np
import pytest
from every_shape import every_shape
from longlive_kernels import arch
from longlive_kernels.attention import mosaic_tcgen05, tile
from longlive_kernels.attention.sink_window import (
    Fresh,
    Scaled,
    api,
    kept,
    mosaic,
    mosaic_load,
    reference,
    shapes,
    sink_window,
    xla,
)
from longlive_kernels.attention.sink_window.call import Call
from longlive_kernels.attention.sink_window.visits import visits
from longlive_kernels.nvfp4 import NVFP4

from longlive_jax.config import TINY, WAN21_T2V_1_3B, WAN22_TI2V_5B
from longlive_jax.dit import rope

EIGHT = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
# Of the largest number. float32: sums in another order. bfloat16 has 8 bits: the output is rounded
# once, and so are the weights of the softmax and what is unpacked or turned.
FLOAT32, BFLOAT16 = 1e-5, 2**-7


def small(shape: shapes.Shape) -> shapes.Shape:
    """The same table with few, narrow heads and few tokens, odd where they were no power of two."""
    tokens = {880: 5, 1560: 6}.get(shape.tokens, shape.tokens)
    return dataclasses.replace(
        shape, heads=min(shape.heads, 2), width=min(shape.width, 32), tokens=tokens
    )


def sized(name: str, tokens: int, heads: int = 1) -> shapes.Shape:
    """The same table with so many tokens, and heads as wide as Mosaic needs them."""
    return dataclasses.replace(shapes.SHAPES[name], heads=heads, width=mosaic.WIDTH, tokens=tokens)


TILED = {
    # Slots of a whole tile of keys, and one that is not; of less than that; of exactly one. Several
    # heads, of which each has its own keys, scales and place.
    "rows_differ": sized("rows_differ", 24, heads=3),
    "frames_differ": sized("frames_differ", 72),
    "sinks": sized("sinks", 200),
    "all_but_one_empty": sized("all_but_one_empty", 128),
    # The last half of a block of 256 queries is not there, and of a slot more than one tile is.
    "relative": sized("relative", 264),
    # Blocks of 128 queries and of 256 that are full, and one that is not.
    "one_slot": sized("one_slot", 264),
}
SIMULATED = {name: sized(name, 8) for name in shapes.SHAPES} | TILED
ARCHITECTURES = (90, 100)


def table(rng, sizes: tuple[int, ...], kind: str) -> kept.Kept:
    """Random slots l b slots s a d, kept that way: about as large as numbers of unit variance."""
    if kind in EIGHT:
        values = np.clip(40 * rng.normal(size=sizes), -127, 127).astype(EIGHT[kind])
        return Scaled(jnp.asarray(values), jnp.asarray(scale(rng, sizes[:-1]) / 40))
    if kind != "nvfp4":
        return jnp.asarray(rng.normal(size=sizes), kind)
    *lead, tokens, heads, width = sizes
    rows = (*lead, tokens * heads)
    packed = rng.integers(0, 256, (*rows, width // 2), np.uint8)
    scales = (64 * scale(rng, (*rows, width // 16))).astype(jnp.float8_e4m3fn)
    amax = 6 * scale(rng, lead)
    return NVFP4(*map(jnp.asarray, (packed, scales, amax)), "mse")


def scale(rng, sizes) -> np.ndarray:
    return rng.uniform(0.5, 1.5, sizes).astype(np.float32)


@functools.cache
def operands(name: str, kind: str, dtype: str = "float32", seed: int = 0) -> Call:
    """A call of random numbers, whose layer is the last."""
    return made(small(shapes.SHAPES[name]), kind, dtype, seed)


def made(shape: shapes.Shape, kind: str, dtype: str, seed: int = 0) -> Call:
    rng = np.random.default_rng(seed)

    def normal(*sizes, dtype=dtype):
        return jnp.asarray(rng.normal(size=sizes), dtype)

    layers, rows, slots, *rest = shape.keys
    k, v = (table(rng, shape.keys, kind) for _ in range(2))
    fresh = read = None
    if kind in (*EIGHT, "nvfp4"):
        own = np.broadcast_to(np.array(shape.own, np.int32), (rows, len(shape.own)))
        fresh = Fresh(*(normal(*own.shape, *rest) for _ in range(2)), jnp.asarray(own))
    if shape.relative:
        read = 3 * normal(rows, slots, shape.turned, dtype="float32")
    layer = jnp.int32(layers - 1)
    q, visible = normal(*shape.queries), jnp.asarray(shape.asked)
    return Call(q, k, v, visible, layer, read, fresh, shape.order)


@functools.partial(jax.jit, static_argnames="implementation")
def run(call: Call, implementation: str | None = None) -> jax.Array:
    given = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}
    return sink_window(**given, implementation=implementation)


@functools.partial(jax.jit, static_argnames="ways")
def results(call: Call, ways: tuple[xla.Steps | None, ...]) -> tuple[jax.Array, list[jax.Array]]:
    """By the reference, and by XLA: at once where a way is None, else in steps."""
    call = call.by_frame()
    return reference.attend(call), [
        xla.at_once(call) if by is None else xla.by_steps(call, by) for by in ways
    ]


ONE = xla.Steps(1, 1)
stepped = jax.jit(lambda call: xla.by_steps(call.by_frame(), ONE))


def close(ours, theirs, tolerance: float):
    """The largest difference, of the largest number."""
    ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def check(call: Call, tolerance: float, *ways: xla.Steps | None):
    expected, found = results(call, ways)
    for ours in found:
        assert ours.dtype == call.q.dtype
        close(ours, expected, tolerance)


@pytest.mark.parametrize("name", [*shapes.AWKWARD, *every_shape(shapes.CHUNKS | shapes.RECACHES)])
def test_xla_means_what_the_reference_means(name):
    """At once, and in the smallest steps."""
    check(operands(name, "float32"), FLOAT32, None, ONE)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ragged", "int8"),
        ("ragged", "nvfp4"),
        ("rows_differ", "bfloat16"),
        ("rows_differ", "fp8"),
        ("frames_differ", "nvfp4"),
        ("relative", "int8"),
        ("relative", "nvfp4"),
    ],
)
def test_it_does_so_however_slots_are_kept(name, kind):
    """Also in steps of all queries and some slots."""
    call = operands(name, kind)
    check(call, FLOAT32, None, ONE, xla.Steps(call.frames, 3))


@pytest.mark.parametrize(
    ("name", "kind"), [("5b_chunk", "bfloat16"), ("5b_chunk", "nvfp4"), ("relative", "fp8")]
)
def test_in_bfloat16_sums_are_float32(name, kind):
    check(operands(name, kind, "bfloat16"), BFLOAT16, None, ONE)


def multiplied(call: Call) -> Call:
    """Its keys are multiplied as they are kept."""
    return dataclasses.replace(call, k=dataclasses.replace(call.k, multiplied=True))


@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [
        ("sinks", "int8", "float32"),
        ("frames_differ", "fp8", "float32"),
        ("ragged", "fp8", "bfloat16"),
    ],
)
def test_scores_may_be_products_of_eight_bits(name, kind, dtype, monkeypatch):
    """Of queries and fresh keys that are rounded as slots are, and of nothing else."""
    call = operands(name, kind, dtype)
    top = {"int8": 127, "fp8": 448}[kind]

    def rounded(x):
        x = np.asarray(x, np.float32)
        scale = np.abs(x).max(-1, keepdims=True) / np.float32(top)
        codes = np.rint(x / scale) if kind == "int8" else x / scale
        return jnp.asarray(codes.astype(EIGHT[kind]).astype(np.float32) * scale)

    fresh = dataclasses.replace(call.fresh, k=rounded(call.fresh.k))
    by_hand = reference.attend(dataclasses.replace(call, q=rounded(call.q), fresh=fresh))
    expected = reference.attend(multiplied(call))
    assert expected.dtype == call.q.dtype
    tolerance = FLOAT32 if dtype == "float32" else BFLOAT16
    close(expected, by_hand, tolerance)
    assert np.abs(np.asarray(expected - reference.attend(call), np.float32)).max() > 0
    close(xla.attend(multiplied(call)), expected, tolerance)
    monkeypatch.setattr(xla, "steps", lambda call: ONE)
    close(xla.attend(multiplied(call)), expected, tolerance)


def test_gradients_go_through_rounded_queries():
    """As if they were not, to what they are rounded to."""
    call = operands("frames_differ", "int8")

    def gradient(call):
        def loss(q, k):
            fresh = dataclasses.replace(call.fresh, k=k)
            return (xla.attend(dataclasses.replace(call, q=q, fresh=fresh)) ** 2).sum()

        return jax.grad(loss, (0, 1))(call.q, call.fresh.k)

    already = multiplied(call).rounded(jnp.float32)
    for found, expected in zip(gradient(multiplied(call)), gradient(already), strict=True):
        assert np.abs(expected).max() > 0.01
        close(found, expected, FLOAT32)


@functools.partial(jax.jit, static_argnames="ways")
def gradients(call: Call, ways: tuple[Callable[[Call], jax.Array], ...]) -> list[list[jax.Array]]:
    """Of what is real of a call, by the reference and `ways`, for a loss that weighs outputs."""
    call = call.by_frame()
    real, rest = ({n: getattr(call, n) for n in names} for names in (("q", "k", "v"), REST))
    fresh = call.fresh and (call.fresh.k, call.fresh.v)
    if call.fresh is not None:
        del real["k"], real["v"]
        rest |= dict(k=call.k, v=call.v)

    def loss(real, fresh, attend):
        new = call.fresh and Fresh(*fresh, call.fresh.slots)
        out = attend(Call(**real, **rest, fresh=new)).astype(jnp.float32)
        return (out * jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)).sum()

    found = (
        jax.grad(loss, (0, 1) if fresh else 0)(real, fresh, x) for x in (reference.attend, *ways)
    )
    return [jax.tree.leaves(x) for x in found]


REST = ("visible", "layer", "read")


def check_gradients(call: Call, tolerance: float, *ways: Callable[[Call], jax.Array]):
    theirs, *found = gradients(call, ways)
    assert len(theirs) == 3
    largest = [np.abs(np.asarray(x, "f4")).max() for x in theirs]
    # Some are zero: of what is not seen, and of the scores of a single key.
    assert (max(largest) > 0.01) == bool(call.visible.any())
    for ours in found:
        for mine, its, most in zip(ours, theirs, largest, strict=True):
            assert mine.dtype == its.dtype
            mine, its = np.asarray(mine, "f4"), np.asarray(its, "f4")
            assert np.abs(mine - its).max() <= tolerance * (most or 1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rows_differ", "float32"),
        ("frames_differ", "int8"),
        ("relative", "float32"),
        *every_shape(zip(shapes.SHAPES, itertools.cycle(("float32", "nvfp4")))),
    ],
)
def test_xla_has_the_gradient_of_the_reference(name, kind):
    """At once, and in steps."""
    call = operands(name, kind)
    ways = (functools.partial(xla.by_steps, by=by) for by in (ONE, xla.Steps(call.frames, 3)))
    check_gradients(call, FLOAT32, xla.at_once, *ways)


@pytest.mark.parametrize(
    ("name", "kind"), [("5b_chunk", "bfloat16"), ("frames_differ", "nvfp4"), ("relative", "fp8")]
)
def test_gradients_in_bfloat16_are_summed_in_float32(name, kind):
    """They have two more roundings than the output."""
    by_steps = functools.partial(xla.by_steps, by=ONE)
    check_gradients(operands(name, kind, "bfloat16"), 2 * BFLOAT16, xla.at_once, by_steps)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_gradients_repeat_to_the_bit(kind):
    ways = xla.at_once, functools.partial(xla.by_steps, by=ONE)
    call = operands("sinks", kind)
    for first, again in zip(gradients(call, ways), gradients(call, ways), strict=True):
        for one, other in zip(first, again, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_step_is_as_large_as_scores_allow():
    def of(name: str, scores: int = xla.SCORES) -> xla.Steps:
        shape, found = shapes.SHAPES[name], []

        def trace(q, table, visible):
            found.append(xla.steps(Call(q, table, table, visible, jnp.int32(0)), scores))
            return q

        kinds = (shape.queries, jnp.bfloat16), (shape.keys, jnp.bfloat16), (shape.table.shape, bool)
        jax.eval_shape(trace, *(jax.ShapeDtypeStruct(*kind) for kind in kinds))
        return found.pop()

    assert of("tiny_chunk") == xla.Steps(3, 12)  # all
    assert of("tiny_recache") == xla.Steps(12, 12)
    assert of("5b_chunk") == of("5b_recache") == of("5b_guidance") == ONE
    of_a_pair = 24 * 880**2
    assert of("5b_chunk", 3 * of_a_pair) == xla.Steps(2, 1)  # two divide eight frames
    assert of("5b_chunk", 24 * of_a_pair) == xla.Steps(8, 3)
    assert of("5b_chunk", 1) == ONE


def test_one_slot_in_float32_is_attended_as_by_the_reference():
    def same(name: str, dtype: str) -> bool:
        given = operands(name, dtype, dtype)
        ours, theirs = (jax.make_jaxpr(x.attend)(given) for x in (xla, reference))
        return str(ours) == str(theirs)

    assert same("one_slot", "float32")
    # In few bits products are of those; of many keys, axes are turned first.
    assert not same("one_slot", "bfloat16") and not same("sinks", "float32")


def test_what_is_large_goes_by_steps(monkeypatch):
    call, asked = operands("tiny_chunk", "float32"), []
    monkeypatch.setattr(xla, "by_steps", lambda call, by: asked.append(by) or call.q)
    xla.attend(call)
    monkeypatch.setattr(xla, "steps", lambda call: xla.Steps(3, 11))
    xla.attend(call)
    assert asked == [xla.Steps(3, 11)]


def test_lists_hold_what_is_seen_and_nothing_else():
    rng = np.random.default_rng(0)
    seen = rng.random((4, 5, 9)) < np.linspace(0, 1, 5)[:, None]
    index, count = jax.jit(visits)(seen)
    np.testing.assert_array_equal(count, seen.sum(-1))
    for row, number, expected in zip(
        np.asarray(index).reshape(-1, 9),
        np.asarray(count).ravel(),
        seen.reshape(-1, 9),
        strict=True,
    ):
        assert row[:number].tolist() == np.flatnonzero(expected).tolist()
        assert not row[number:].any()


@pytest.mark.parametrize("name", ["5b_first", "5b_recache", "rows_differ", "nobody_sees"])
@pytest.mark.parametrize("kind", ["float32", "nvfp4"])
def test_as_many_slots_are_read_as_are_seen(name, kind, monkeypatch):
    """In each step of the loop, of every query frame: counted as the program runs."""
    call, read = operands(name, kind).by_frame(), []
    plain = kept.plain

    def counted(x, heads, dtype):
        jax.debug.callback(lambda: read.append(1))
        return plain(x, heads, dtype)

    monkeypatch.setattr(kept, "plain", counted)
    jax.block_until_ready(jax.jit(lambda call: xla.by_steps(call, ONE))(call))
    jax.effects_barrier()
    # Rows run side by side, as long as the longest list.
    seen = shapes.SHAPES[name].table
    if call.fresh is not None:
        own = np.isin(np.arange(seen.shape[2]), shapes.SHAPES[name].own)
        expected = sum((seen & part).sum(2).max(0).sum() for part in (own, ~own))
    else:
        expected = seen.sum(2).max(0).sum()
    assert len(read) == 2 * expected  # keys and values


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_queries_that_see_nothing_are_zero(implementation):
    call = operands("rows_differ", "float32")
    found = np.asarray(run(call, implementation))
    assert not found[2].any() and found[[0, 1, 3]].all(-1).any()
    assert not np.asarray(run(operands("nobody_sees", "float32"), implementation)).any()


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_what_nobody_sees_does_not_matter(kind):
    """Nor do other layers, nor what lies in the slots of fresh frames."""
    call, other = operands("sinks", kind), operands("sinks", kind, seed=1)
    shape = shapes.SHAPES["sinks"]
    keep = shape.table.any((0, 1))
    if call.fresh is not None:
        keep[list(shape.own)] = False

    def mixed(x, y):
        mask = np.zeros(x.shape[:3], bool)
        mask[-1] = keep
        return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 3)), x, y)

    pair = {name: jax.tree.map(mixed, getattr(call, name), getattr(other, name)) for name in "kv"}
    mixture = dataclasses.replace(call, **pair)
    for way in (run, stepped):
        found = way(call)
        np.testing.assert_array_equal(found, way(mixture))
        assert (np.asarray(found) != np.asarray(way(other))).any()


@pytest.mark.parametrize("kind", ["bfloat16", "nvfp4"])
def test_a_table_may_be_of_one_layer_alone(kind):
    call = operands("sinks", kind)
    alone = {name: kept.of_layer(getattr(call, name), call.layer) for name in "kv"}
    for way in (run, stepped):
        found = way(dataclasses.replace(call, layer=None, **alone))
        np.testing.assert_array_equal(found, way(call))


@pytest.mark.parametrize("name", ["tiny_chunk", "relative"])
def test_a_fresh_frame_past_the_last_slot_takes_no_place(name):
    call = operands(name, "int8")
    nowhere = dataclasses.replace(call.fresh, slots=jnp.full_like(call.fresh.slots, call.slots))
    call = dataclasses.replace(call, fresh=nowhere)
    for way in (run, stepped):
        np.testing.assert_array_equal(way(call), way(dataclasses.replace(call, fresh=None)))


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_two_calls_give_equal_bits(kind):
    call = operands("sinks", kind)
    for way in (run, stepped):
        np.testing.assert_array_equal(way(call), way(call))


def test_keys_are_turned_as_the_library_turns_them():
    """By one phase of a slot for all of its tokens, and no more pairs than there are phases of."""
    x = jax.random.normal(jax.random.key(0), (2, 6, 3, 2, 8))  # b slots s a d
    phases = jnp.arange(36.0).reshape(2, 6, 3)
    each = jnp.repeat(jnp.pad(phases, ((0, 0), (0, 0), (0, 1))), 3, 1)
    expected = rope.rotate(x.reshape(2, 18, 2, 8), each).reshape(x.shape)
    found = kept.turned(x, phases[:, :, None, None])
    np.testing.assert_array_equal(found, expected)


def test_shapes_are_those_of_the_library():
    models = {"TINY": TINY, "WAN_1_3B": WAN21_T2V_1_3B, "WAN_5B": WAN22_TI2V_5B}
    for name, cfg in models.items():
        facts = dict(heads=cfg.dit.heads, width=cfg.dit.head_dim, tokens=cfg.tokens_per_frame)
        assert getattr(shapes, name) == facts
        turned = shapes.Shape((), (), **facts).turned
        assert turned == len(rope.frequencies(cfg.dit)[0])
    for name, cfg in (("1.3b", WAN21_T2V_1_3B), ("5b", WAN22_TI2V_5B), ("tiny", TINY)):
        chunk, window = shapes.SHAPES[f"{name}_chunk"].table.shape[1:]
        assert (chunk, window) == (cfg.stream.chunk, cfg.stream.window)


def broken(**changes):
    return dataclasses.replace(operands("tiny_chunk", "float32"), **changes)


def test_what_does_not_fit_is_refused():
    call = operands("tiny_chunk", "float32")
    eight = operands("tiny_chunk", "int8")
    phases = jnp.zeros((1, eight.slots, 6))
    turned = multiplied(dataclasses.replace(eight, read=phases))
    new = eight.fresh
    short = dataclasses.replace(new, k=new.k[:, :, :1], v=new.v[:, :, :1])  # too few tokens
    for changes, message in (
        (dict(visible=call.visible.repeat(5, 1)), "neither one row nor one for each of 3"),
        (dict(q=call.q[:, :-1]), "do not fit `visible`"),
        (dict(k=call.k[..., :1, :]), "keys of one layer are"),
        (dict(v=call.v[:, :, :-1]), "values of one layer are"),
        (dict(layer=None), "keys of one layer are"),
        (dict(v=eight.v), "kept in one way, not as float32 and int8"),
        (dict(read=jnp.zeros((1, 3, 6))), "do not turn keys"),
        (dict(read=jnp.zeros((1, call.slots, 17))), "do not turn keys"),
        (dict(fresh=short), "fresh frames"),
        (dict(k=eight.k, v=turned.k), "keys alone are multiplied as they are kept"),
        (dict(k=turned.k, v=turned.v, read=phases), "keys that are turned as they are read"),
    ):
        with pytest.raises(ValueError, match=message):
            broken(**changes).check()
    unknown = broken()
    object.__setattr__(unknown, "order", "sorted")  # which tests' types refuse elsewhere
    with pytest.raises(ValueError, match="order 'sorted': one of any, nested, prefix"):
        unknown.check()
    with pytest.raises(NotImplementedError, match="no backend 'flash': there are cudnn, xla"):
        run(call, "flash")
    with pytest.raises(NotImplementedError, match="xla takes queries of one of"):
        run(broken(q=call.q.astype(jnp.float8_e4m3fn)), "xla")


@contextlib.contextmanager
def simulator():
    """In which what a copy would write beyond the end of an array is left out, as on a GPU."""
    from jax._src.pallas.mosaic.interpret import shared_memory

    store = shared_memory.Buffer.__setitem__

    def clipped(buffer, place, value):
        place = place + tuple(slice(0, size) for size in buffer.logical_shape[len(place) :])
        inside, kept = [], []
        for at, size in zip(place, buffer.logical_shape, strict=True):
            if isinstance(at, slice):
                at = slice(min(at.start, size), min(at.stop, size))
                inside.append(slice(0, at.stop - at.start))
            kept.append(at)
        store(buffer, tuple(kept), value[tuple(inside)])

    with mosaic_on_cpu.simulated():
        with mock.patch.object(shared_memory.Buffer, "__setitem__", clipped):
            yield


def asked(name: str, kind: str) -> Call:
    """kind: also int8_scores and fp8_scores, of which keys are multiplied so, too."""
    kind, _, scores = kind.partition("_")
    call = made(SIMULATED[name], kind, "bfloat16")
    return multiplied(call) if scores else call


@functools.cache
def simulated(name: str, kind: str, sm: int) -> np.ndarray:
    attend = jax.jit(functools.partial(mosaic.attend, sm=sm))
    with simulator():
        return np.asarray(attend(asked(name, kind)), "f4")


BRIEF = [
    *((name, "bfloat16", sm) for name in TILED for sm in ARCHITECTURES),
    *((name, "nvfp4", sm) for name in ("frames_differ", "relative") for sm in ARCHITECTURES),
    *(("sinks", "int8", sm) for sm in ARCHITECTURES),
    ("rows_differ", "fp8", 90),  # unpacked by the same for both
    ("rows_differ", "nvfp4", 90),
    ("sinks", "int8_scores", 90),
    ("rows_differ", "fp8_scores", 90),
]
OTHERS = [
    *((name, "bfloat16", sm) for name in SIMULATED for sm in ARCHITECTURES),
    *zip(SIMULATED, itertools.cycle(("nvfp4", "int8", "fp8")), itertools.cycle(ARCHITECTURES)),
    *(("relative", "fp8", sm) for sm in ARCHITECTURES),
    ("5b_guidance", "int8_scores", 90),
    ("frames_differ", "fp8_scores", 90),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "sm"),
    [
        *BRIEF,
        *every_shape(x for x in OTHERS if x not in BRIEF),
    ],
)
def test_mosaic_means_what_the_reference_means(name, kind, sm):
    call = asked(name, kind)
    assert mosaic.unsupported(call, sm=sm) is None
    expected, _ = results(call, ())
    close(simulated(name, kind, sm), expected, BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["bfloat16", "nvfp4"])
def test_mosaic_reads_a_table_of_one_layer_alone(kind, sm):
    call = asked("ragged", kind)
    alone = {name: kept.of_layer(getattr(call, name), call.layer) for name in "kv"}
    with simulator():
        attend = jax.jit(functools.partial(mosaic.attend, sm=sm))
        found = attend(dataclasses.replace(call, layer=None, **alone))
    np.testing.assert_array_equal(np.asarray(found, "f4"), simulated("ragged", kind, sm))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "sm"),
    [("rows_differ", "bfloat16", 90), ("rows_differ", "nvfp4", 90), ("sinks", "bfloat16", 100)],
)
def test_runs_of_mosaic_repeat_to_the_bit(name, kind, sm):
    np.testing.assert_array_equal(simulated(name, kind, sm), simulated.__wrapped__(name, kind, sm))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "sm"),
    [
        *(("ragged", "bfloat16", sm) for sm in ARCHITECTURES),
        *every_shape(("relative", "nvfp4", sm) for sm in ARCHITECTURES),
        *every_shape([("frames_differ", "int8_scores", 90)]),
    ],
)
def test_mosaic_has_the_gradient_of_the_reference(name, kind, sm):
    with simulator():
        attend = functools.partial(mosaic.attend, sm=sm)
        check_gradients(asked(name, kind), 2 * BFLOAT16, attend)


@pytest.mark.slow
@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_queries_that_see_nothing_are_zero_by_mosaic(sm):
    found = simulated("rows_differ", "bfloat16", sm)
    assert not found[2].any() and found[[0, 1, 3]].all(-1).any()


@pytest.mark.parametrize("blocks", [mosaic.BLOCKS, mosaic.TURNING])
@pytest.mark.parametrize(("units", "coded"), mosaic.BLOCKS)
def test_threads_have_the_registers_that_they_ask_for(units, coded, blocks):
    """A core has 64 Ki of them. Threads that ask for more than are left wait for ever."""
    loads, has_softmax = blocks[units, coded].registers
    others = [mosaic_tcgen05.ASKING] if units == "tcgen05" else []
    assert len(others) + 1 + tile.GROUPS == mosaic._kernel(units).warpgroups
    each = [loads, *others, *[has_softmax] * tile.GROUPS]
    assert all(24 <= count <= 256 and count % 8 == 0 for count in each)
    assert 128 * sum(each) <= 2**16


@pytest.mark.parametrize("kind", ["bfloat16", "nvfp4"])
@pytest.mark.parametrize("name", ["5b_recache", "5b_first", "1.3b_second", "rows_differ", "sinks"])
def test_mosaic_loops_over_as_many_slots_as_are_seen(name, kind):
    """The lists name those of the table, then the fresh ones: each once, and no other."""
    call, shape = operands(name, kind).by_frame(), shapes.SHAPES[name]
    rows, frames, count = shape.table.shape
    seen = [call.visible] if call.fresh is None else kept.divided(call.visible, call.fresh)
    lists = np.asarray(jax.jit(mosaic.lists)(call, list(seen)))
    assert lists.shape[0] == rows * frames
    assert (lists[:, 0] == (shape.layers - 1) * rows * count).all()  # where the layer begins
    assert lists[:, 1 : 1 + len(seen)].sum() == shape.pairs
    for at, (row, frame) in enumerate(np.ndindex(rows, frames)):
        found, column = [], 1 + len(seen)
        for source, mask in enumerate(seen):
            width, number = mask.shape[2], lists[at, 1 + source]
            named = lists[at, column : column + number]
            assert (named // width == row).all()
            found += (named % width if source == 0 else np.array(shape.own)[named % width]).tolist()
            column += width
        assert sorted(found) == np.flatnonzero(shape.table[row, frame]).tolist()


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_bytes_are_read_exactly(dtype):
    """All of them but NaN, the smallest of e4m3 included."""
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(dtype).astype(np.float32)
    read = {jnp.int8: mosaic_load._int8, jnp.float8_e4m3fn: mosaic_load._e4m3}[dtype]
    found = np.asarray(read(jnp.asarray(codes, jnp.int32)[None]))[0]
    real = np.isfinite(expected)
    np.testing.assert_array_equal(found[real], expected[real])


def test_halves_are_merged():
    x = jnp.arange(24.0).reshape(3, 8)
    ordered = mosaic.ordered(x, "nvfp4")
    assert ordered[0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    np.testing.assert_array_equal(mosaic.merged(ordered, "nvfp4"), x)
    for other in (mosaic.ordered, mosaic.merged):
        np.testing.assert_array_equal(other(x, "int8"), x)


def test_mosaic_says_what_it_lacks():
    call = made(SIMULATED["rows_differ"], "bfloat16", "bfloat16")
    for changes, sm, reason in (
        ({}, None, "needs an NVIDIA GPU"),
        ({}, 120, "is for sm_90, sm_100, sm_103, not sm_120"),
        (dict(q=call.q.astype(jnp.float32)), 100, "queries in bfloat16, not float32"),
        (dict(q=call.q.astype(jnp.float32)), 90, "queries in bfloat16, not float32"),
        (dict(k=call.k.astype(jnp.float32)), 90, "not float32"),
        (dict(read=jnp.zeros((4, 8, 33))), 90, "turns keys by 32 phases of a slot at most, not 33"),
    ):
        assert re.search(reason, mosaic.unsupported(dataclasses.replace(call, **changes), sm=sm))
    eight = asked("rows_differ", "int8_scores")
    assert mosaic.unsupported(eight, sm=90) is None
    assert "keys in eight bits on sm_90 alone" in mosaic.unsupported(eight, sm=100)
    odd = made(dataclasses.replace(SIMULATED["rows_differ"], tokens=12), "int8", "bfloat16")
    assert "a multiple of 8 tokens, not 12" in mosaic.unsupported(odd, sm=90)
    assert "128 wide, not 32" in mosaic.unsupported(
        operands("5b_chunk", "bfloat16", "bfloat16"), sm=90
    )
    with pytest.raises(NotImplementedError, match="mosaic needs an NVIDIA GPU"):
        run(call, "mosaic")


@pytest.mark.parametrize("sm", [None, 90, 100])
def test_on_nvidia_gpus_cudnn_is_the_default_where_it_takes_a_call(monkeypatch, sm):
    monkeypatch.setattr(arch, "default", lambda: sm)
    call = made(SIMULATED["rows_differ"], "bfloat16", "bfloat16")
    assert api._backend(None, call) is (xla if sm is None else api.BACKENDS["cudnn"])
    call = dataclasses.replace(call, q=call.q.astype(jnp.float32))
    assert api._backend(None, call) is xla
