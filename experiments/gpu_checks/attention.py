"""One backend of attention: its largest error, whether it repeats to the bit, and its time.

python -m gpu_checks.attention RESULTS BACKEND ENTRY…, an entry being "OP @ SHAPE": an op of
`longlive_jax.bench_ops` and one of its shapes. Queries are bfloat16.

Expected results come from the op's `reference` backend, one head at a time: heads are independent,
and the dense scores of all heads would not fit in memory. Where those of a single head do not fit
either, they come from `xla`. Both compute in float32 with matmuls of the highest precision.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from longlive_kernels.nvfp4.format import NVFP4

from gpu_checks import child
from longlive_jax import bench_kernels, report
from longlive_jax.bench_ops import OPS, Case, Op

DTYPE = jnp.dtype(jnp.bfloat16)
TOLERANCES = (2**-7, 2**-6)  # of the output; of gradients, which have two more roundings
SCORES = 5  # arrays of all scores that the reference holds at once; twice as many for gradients
ALL_HEADS = 4e13  # FLOPs: where expected results take more, only two heads are compared
SAMPLES = 15
SAMPLE_S = 0.02  # of each sample: as many calls as this takes
BUDGET_S = 3.0  # of all samples


@dataclasses.dataclass(frozen=True)
class Entry:
    """An op at a shape, for one backend."""

    op: Op
    shape: Any
    case: Case
    backend: Any

    @property
    def gradient(self) -> bool:
        return self.op.name.endswith("gradient")


def measure(backend: str, name: str) -> dict[str, Any]:
    """Runs a backend on the entry `name` and returns its facts.

    Raises:
      Skipped: it cannot run it.
      Wrong: its result is too far from the expected one.
    """
    op_name, shape_name = name.split(" @ ")
    op = OPS[op_name]
    if backend not in op.backends:
        raise child.Skipped(f"{op_name} has no such backend")
    shape = op.shapes[shape_name]
    case = op.case(shape, DTYPE)
    reason = case.refusal(op.backends[backend])
    if reason is not None:
        raise child.Skipped(reason)
    entry = Entry(op, shape, case, op.backends[backend])
    operands = jax.block_until_ready(jax.jit(case.make)(jax.random.key(0)))
    program, facts = _compiled(entry, operands)
    found = jax.block_until_ready(program(*operands))
    facts["default"] = _is_default(entry)
    facts["repeats_to_the_bit"] = bool(_same(found, program(*operands)))
    facts |= _compared(entry, operands, found)
    del found
    facts |= _timed(functools.partial(program, *operands), case.flops)
    return _judged(facts)


def _compiled(entry: Entry, operands: tuple) -> tuple[Callable, dict[str, Any]]:
    """The program, the time to compile it and the memory that it needs beside operands."""
    start = time.perf_counter()
    call = jax.jit(lambda *x: entry.case.call(entry.backend, *x))
    program = call.lower(*operands).compile()
    took = time.perf_counter() - start
    return program, {"compile_s": took, "temporary_bytes": report.check_room(program)}


def _is_default(entry: Entry) -> bool:
    """Whether the op picks this backend here where none is named: the first that can."""
    able = (x for x in entry.op.backends.values() if entry.case.refusal(x) is None)
    return next(able) is entry.backend


@jax.jit
def _same(one: Any, other: Any) -> jax.Array:
    """Whether two results are the same numbers, bit by bit."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return jnp.array([jnp.array_equal(_bits(x), _bits(y)) for x, y in pairs]).all()


def _bits(x: jax.Array) -> jax.Array:
    whole = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, whole)


def _compared(entry: Entry, operands: tuple, found: Any) -> dict[str, Any]:
    """The largest difference over the largest expected number, of the output and each gradient."""
    against, flops = _against(entry)
    heads = entry.shape.heads
    chosen = range(heads) if flops <= ALL_HEADS else sorted({0, heads - 1})
    difference = _difference(entry, against)
    both = [difference(jnp.int32(head), operands, found) for head in chosen]
    off, most = np.array(both).max(0).tolist()  # NaN stays NaN
    errors = [x / y if y else x for x, y in zip(off, most, strict=True)]
    return {
        "against": f"{against} in float32",
        "heads_compared": len(chosen),
        "error": errors[0],
        "gradient_errors": errors[1:],
        "tolerance": TOLERANCES[0],
        "gradient_tolerance": TOLERANCES[1],
    }


def _against(entry: Entry) -> tuple[str, float]:
    """The backend that computes expected results, and its FLOPs over all heads."""
    shape, times = entry.shape, 3.5 if entry.gradient else 1
    rows, n, *_ = shape.queries
    slots = shape.keys[-4] if len(shape.keys) == 6 else 1
    m = slots * shape.keys[-3]
    dense = 4.0 * rows * n * m * shape.width * shape.heads * times
    scores = 4 * SCORES * rows * n * m * (2 if entry.gradient else 1)  # bytes, of one head
    fits = scores <= report.free_memory() / 2
    return ("reference", dense) if fits else ("xla", entry.case.flops)


def _difference(entry: Entry, against: str) -> Callable:
    """A compiled function of a head, operands and a result: the largest difference of each array of
    the result to the expected one, and the largest number of each expected array.
    """
    heads = entry.shape.heads
    case = entry.op.case(dataclasses.replace(entry.shape, heads=1), jnp.dtype(jnp.float32))
    call = functools.partial(case.call, entry.op.backends[against])

    def difference(head: jax.Array, operands: tuple, found: Any) -> tuple[list, list]:
        with jax.default_matmul_precision("highest"):
            expected = call(*_of_head(operands, heads, head))
        off, most = [], []
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            error = jnp.abs(_numbers(_pick(ours, head)) - theirs)
            # On CPUs, XLA's maximum need not be NaN where a number is.
            off.append(jnp.where(jnp.isfinite(error).all(), error.max(), jnp.nan))
            most.append(jnp.abs(theirs).max())
        return off, most

    return jax.jit(difference)


def _of_head(operands: tuple, heads: int, head: jax.Array) -> tuple:
    """Operands of one head.

    Arrays that have heads have them in the axis before channels, and at least four axes; others
    (`visible`, slots, phases) have at most three.
    """

    def part(x: Any) -> Any:
        if isinstance(x, NVFP4):
            return _rows_of_head(x, heads, head)
        return x if x.ndim < 4 else _numbers(_pick(x, head))

    return jax.tree.map(part, operands, is_leaf=lambda x: isinstance(x, NVFP4))


def _rows_of_head(x: NVFP4, heads: int, head: jax.Array) -> NVFP4:
    """NVFP4 has tokens and heads as one axis."""

    def pick(part: jax.Array) -> jax.Array:
        *lead, rows, columns = part.shape
        return _pick(part.reshape(*lead, rows // heads, heads, columns), head)[..., 0, :]

    return dataclasses.replace(x, packed=pick(x.packed), scales=pick(x.scales))


def _pick(x: jax.Array, head: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, head, 1, axis=-2)


def _numbers(x: jax.Array) -> jax.Array:
    """Casts bfloat16 to float32; quantised values stay as they are."""
    return x.astype(jnp.float32) if x.dtype == DTYPE else x


def _timed(act: Callable[[], Any], flops: float) -> dict[str, Any]:
    """Milliseconds of a call, over samples of as many calls as can be timed well."""
    queued = jax.default_backend() != "cpu"  # there calls run one after the other
    once = bench_kernels.seconds_of(act)
    calls = max(1, min(1000, int(SAMPLE_S / once)))
    samples = max(1, min(SAMPLES, int(BUDGET_S / (once * calls))))
    times = [bench_kernels.seconds_of(act, calls, queued) * 1e3 for _ in range(samples)]
    middle = statistics.median(times)
    return {
        "ms": {"median": middle, "min": min(times), "max": max(times)},
        "samples": samples,
        "calls_per_sample": calls,
        "tflops": flops / middle / 1e9,  # of visible pairs
    }


def _judged(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts. Raises Wrong where an error is not within its tolerance, as NaN never is."""
    near = facts["error"] <= facts["tolerance"]
    steep = all(x <= facts["gradient_tolerance"] for x in facts["gradient_errors"])
    if not (near and steep):
        errors = ", ".join(f"{x:.3g}" for x in (facts["error"], *facts["gradient_errors"]))
        raise child.Wrong(f"too far from {facts['against']}: {errors} of the largest", facts)
    return facts


if __name__ == "__main__":
    of_backend = functools.partial(measure, sys.argv[2])
    child.each(pathlib.Path(sys.argv[1]), sys.argv[3:], of_backend)
