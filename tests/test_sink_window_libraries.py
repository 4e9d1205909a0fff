"""Attention over a table of slots by libraries: what they are given, and what becomes of it. On
CPUs by what the same function of a library has for every device.
"""

import dataclasses
import functools
import importlib.util
import itertools
import re
from typing import get_args
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_shape import every_shape
from longlive_kernels import absent_gpu
from longlive_kernels.attention.sink_window import (
    Order,
    cudnn,
    reference,
    rows,
    shapes,
    tokamax,
)
from test_sink_window import (
    BFLOAT16,
    FLOAT32,
    check_gradients,
    close,
    gradients,
    made,
    operands,
    run,
    sized,
    small,
)

LIBRARIES = {"cudnn": cudnn, "tokamax": tokamax}
# Slots in any order of time: of three chunks of two frames, the first is in the middle.
CHUNK_OF_SLOT = np.array([1, 1, 0, 0, 2, 2])
NESTED = dataclasses.replace(
    shapes.SHAPES["tiny_recache"],
    visible=shapes.tupled((CHUNK_OF_SLOT[None, :] <= CHUNK_OF_SLOT[:, None])[None]),
    own=tuple(range(6)),
)
ODD = [
    ("ragged", "int8", "float32"),
    ("rows_differ", "nvfp4", "float32"),
    ("relative", "fp8", "float32"),
    ("frames_differ", "int8", "bfloat16"),
    ("nobody_sees", "bfloat16", "bfloat16"),
]


@functools.cache
def program(library: str | None):
    """Compiled once for shapes that differ in what is seen."""
    if library is None:
        return jax.jit(reference.attend)
    return jax.jit(functools.partial(LIBRARIES[library].attend, implementation="xla"))


@functools.cache
def expected(name: str, kind: str, dtype: str) -> np.ndarray:
    return np.asarray(program(None)(operands(name, kind, dtype)))


def found(library: str, name: str, kind: str, dtype: str) -> np.ndarray:
    if library == "tokamax":
        pytest.importorskip("tokamax", reason="needs tokamax: pip install tokamax")
    with jax.numpy_dtype_promotion("standard"):  # inside `jax.nn`
        return np.asarray(program(library)(operands(name, kind, dtype)))


@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [*ODD, *every_shape((x, "float32", "float32") for x in shapes.SHAPES)],
)
@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_mean_what_the_reference_means(library, name, kind, dtype):
    ours, theirs = found(library, name, kind, dtype), expected(name, kind, dtype)
    assert ours.dtype == theirs.dtype
    close(ours, theirs, FLOAT32 if dtype == "float32" else BFLOAT16)
    if name in ("rows_differ", "nobody_sees"):
        nothing = ~shapes.SHAPES[name].table.any(2).repeat(operands(name, kind, dtype).tokens, 1)
        assert nothing.any() and not ours[nothing].any()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rows_differ", "float32"),
        ("frames_differ", "int8"),
        *every_shape((x, "float32") for x in shapes.SHAPES),
    ],
)
@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_have_the_gradient_of_the_reference(library, name, kind):
    if library == "tokamax":
        pytest.importorskip("tokamax", reason="needs tokamax: pip install tokamax")
    attend = functools.partial(LIBRARIES[library].attend, implementation="xla")
    with jax.numpy_dtype_promotion("standard"):
        check_gradients(operands(name, kind), FLOAT32, attend)


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_libraries_are_given_repeats_to_the_bit(library):
    """Also for the gradient."""
    if library == "tokamax":
        pytest.importorskip("tokamax", reason="needs tokamax: pip install tokamax")
    call = operands("rows_differ", "float32")
    ways = (functools.partial(LIBRARIES[library].attend, implementation="xla"),)
    with jax.numpy_dtype_promotion("standard"):
        runs = [(program(library)(call), gradients(call, ways)) for _ in range(2)]
    for one, other in zip(*map(jax.tree.leaves, runs), strict=True):
        np.testing.assert_array_equal(one, other)


def handed_over(call) -> list[tuple[np.ndarray, np.ndarray]]:
    """The keys and lengths of every call of a library."""
    calls = []

    def library(q, k, v, keys):
        jax.debug.callback(lambda *x: calls.append([np.asarray(y) for y in x]), k, keys)
        return q

    jax.block_until_ready(jax.jit(lambda call: rows.attend(call, library))(call))
    jax.effects_barrier()
    return calls


@pytest.mark.parametrize(
    ("name", "order"),
    [
        *itertools.product(["5b_guidance", "5b_recache"], get_args(Order)),
        *itertools.product(["sinks", "frames_differ", "nested"], ["any", "nested"]),
    ],
)
def test_a_row_of_a_library_has_its_keys_in_front(name, order):
    """However much was promised. With "prefix" the slots are handed over as they lie."""
    shape = NESTED if name == "nested" else shapes.SHAPES[name]
    call = dataclasses.replace(made(small(shape), "float32", "float32"), order=order)
    seen, slots = shape.asked, np.asarray(call.windows(jnp.float32)[0])
    calls = handed_over(call)
    unmet = {(row, group) for row in range(seen.shape[0]) for group in range(seen.shape[1])}
    assert len(calls) == seen.shape[1]
    for keys, count in calls:  # in any order
        given = keys.reshape(slots.shape)
        fitting = {
            (row, group)
            for row, group in unmet
            if count[row] == max(seen[row, group].sum() * call.tokens, 1)
            and same_slots(given[row, : seen[row, group].sum()], slots[row][seen[row, group]])
        }
        unmet -= {min(x for x in fitting if x[0] == row) for row in range(seen.shape[0])}
        if order == "prefix":
            np.testing.assert_array_equal(given, slots)
    assert not unmet


def same_slots(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return sorted(x.tobytes() for x in ours) == sorted(x.tobytes() for x in theirs)


def test_no_library_is_asked_for_the_softmax_of_nothing():
    calls = handed_over(operands("rows_differ", "float32"))
    (counts,) = (count for _, count in calls)
    tokens = operands("rows_differ", "float32").tokens
    assert counts.tolist() == [2 * tokens, tokens, 1, 4 * tokens]


@pytest.mark.parametrize("order", ["any", "nested"])
@pytest.mark.parametrize("name", ["frames_differ", "rows_differ", "nested", "relative"])
def test_what_is_promised_changes_no_result(name, order):
    shape = NESTED if name == "nested" else shapes.SHAPES[name]
    call = dataclasses.replace(made(small(shape), "float32", "float32"), order=order)
    with jax.numpy_dtype_promotion("standard"):  # inside `jax.nn`
        ours = np.asarray(program("cudnn")(call))
    close(ours, np.asarray(program(None)(call)), FLOAT32)


@pytest.mark.parametrize(("name", "loops"), [("1.3b_chunk", False), ("frames_differ", True)])
def test_cudnn_is_called_with_the_number_of_keys(name, loops):
    """In the program for GPUs, which needs neither one nor cuDNN to be written down: once, for all
    query frames, or in a loop over them.
    """
    call = made(sized(name, 16), "bfloat16", "bfloat16")
    leaves, tree = jax.tree.flatten(call)
    with absent_gpu.target(mock.Mock(spec=jax.Device, compute_capability="9.0")):
        traced = jax.jit(lambda *x: cudnn.attend(tree.unflatten(x))).trace(*leaves)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    lines = [x.replace(r"\22", '"') for x in text.splitlines() if "stablehlo.custom_call" in x]
    (line,) = lines
    assert "@__cudnn$fmhaSoftmax(" in line and '"mask_type": "PADDING"' in line
    shapes_of = re.search(r"\(tensor<(\S+)>, tensor<(\S+)>", line).groups()
    frames = 1 if loops else call.frames
    assert shapes_of == (f"1x{16 * frames}x1x128xbf16", f"1x{16 * call.slots}x1x128xbf16")
    assert ("stablehlo.while" in text) == loops
    assert "stablehlo.case" not in text and "stablehlo.if" not in text


def test_libraries_say_what_they_lack():
    call = made(sized("rows_differ", 24), "int8", "bfloat16")
    wide = made(dataclasses.replace(sized("rows_differ", 24), width=264), "bfloat16", "bfloat16")
    odd = made(sized("rows_differ", 12), "bfloat16", "bfloat16")
    other = dataclasses.replace(call, q=call.q.astype(jnp.float32))
    half = dataclasses.replace(call, q=call.q.astype(jnp.float16))
    for backend, given, sm, reason in (
        (cudnn, call, None, "needs an NVIDIA GPU"),
        (cudnn, call, 75, "is for sm_80 and later, not sm_75"),
        (cudnn, other, 90, "not float32"),
        (cudnn, wide, 90, "at most 256 wide and of a multiple of 8, not 264"),
        (cudnn, wide, 89, "at most 128 wide"),
        (tokamax, call, None, "needs an NVIDIA GPU"),
        (tokamax, call, 120, "is for sm_90, sm_100, sm_103, not sm_120"),
        (tokamax, other, 100, "not float32"),
        (tokamax, wide, 90, "at most 256 wide, not 264"),
        (tokamax, odd, 90, "a multiple of 8 tokens, not 12"),
    ):
        assert reason in backend.unsupported(given, sm=sm)
    assert cudnn.unsupported(half, sm=80) is cudnn.unsupported(odd, sm=120) is None
    with mock.patch.object(importlib.util, "find_spec", lambda name: None):
        assert tokamax.unsupported(call, sm=90) == "needs tokamax: pip install tokamax"
    for name in LIBRARIES:
        with pytest.raises(NotImplementedError, match=f"{name} needs an NVIDIA GPU"):
            run(call, name)
