"""Attention over a table of slots by libraries: what they are given, and what becomes of it. On
CPUs by what the same function of a library has for every device.
"""

import dataclasses
import functools
import importlib.util
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_shape import every_shape
from longlive_kernels import absent_gpu
from longlive_kernels.attention.sink_window import cudnn, reference, rows, shapes, tokamax
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
)

LIBRARIES = {"cudnn": cudnn, "tokamax": tokamax}
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


@pytest.mark.parametrize("name", ["5b_guidance", "sinks", "frames_differ", "rows_differ"])
def test_a_row_of_a_library_has_its_keys_in_front(name):
    """One for each query frame only where these see different slots."""
    call, asked = operands(name, "float32"), []

    def library(q, k, v, keys):
        jax.debug.callback(lambda *x: asked.append([np.asarray(y) for y in x]), k, keys)
        return q

    jax.block_until_ready(jax.jit(lambda call: rows.attend(call, library))(call))
    jax.effects_barrier()
    ((given, count),) = asked  # the other way is not gone
    seen, slots = shapes.SHAPES[name].table, np.asarray(call.windows(jnp.float32)[0])
    if name != "frames_differ":
        assert (seen == seen[:, :1]).all()
        seen = seen[:, :1]
    assert count.shape == (seen.shape[0] * seen.shape[1],)
    for at, (row, group) in enumerate(np.ndindex(*seen.shape[:2])):
        front = slots[row][seen[row, group]].reshape(-1, *given.shape[2:])
        assert count[at] == max(len(front), 1)  # none is asked for the softmax of nothing
        np.testing.assert_array_equal(given[at, : len(front)], front)


def test_cudnn_is_called_with_the_number_of_keys():
    """In the program for GPUs, which needs neither one nor cuDNN to be written down."""
    leaves, tree = jax.tree.flatten(made(sized("frames_differ", 16), "bfloat16", "bfloat16"))
    with absent_gpu.target(mock.Mock(spec=jax.Device, compute_capability="9.0")):
        traced = jax.jit(lambda *x: cudnn.attend(tree.unflatten(x))).trace(*leaves)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    lines = [x.replace(r"\22", '"') for x in text.splitlines() if "stablehlo.custom_call" in x]
    assert ["@__cudnn$fmhaSoftmax(" in line for line in lines] == [True, True]
    assert all('"mask_type": "PADDING"' in line for line in lines)
    # Five frames of sixteen tokens as so many rows, and as one.
    queries = {re.search(r"\((tensor<\S+>), tensor<(\S+)>", line).groups() for line in lines}
    assert queries == {(f"tensor<{r}x{80 // r}x1x128xbf16>", f"{r}x80x1x128xbf16") for r in (5, 1)}


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
