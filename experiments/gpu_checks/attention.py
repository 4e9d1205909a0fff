"""One backend of attention: its largest error, whether it repeats to the bit, and its time.

python -m gpu_checks.attention RESULTS BACKEND ENTRY…, an entry being "OP @ SHAPE": an op of
`longlive_jax.bench_ops` and one of its shapes. Numbers are bfloat16.

What is right is said by the op's `reference`, one head after the other: heads do not see each
other, and the dense scores of all of them would not fit. Where those of a single head do not fit
either, it is said by `xla`. Both compute in float32 with products of the highest precision.
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
from longlive_kernels.nvfp4.format import NVFP4

from gpu_checks import child
from longlive_jax import bench_kernels, report
from longlive_jax.bench_ops import OPS, Case, Op

DTYPE = jnp.dtype(jnp.bfloat16)
TOLERANCES = (2**-7, 2**-6)  # of the output; of gradients, which have two more roundings
SCORES = 5  # arrays of all scores that the reference has at a time; of the gradient, twice as many
PATIENCE = 4e13  # FLOPs: of a reference that takes more, two heads are enough
SAMPLES = 15
SAMPLE_S = 0.02  # calls are repeated until they take so long together
BUDGET_S = 3.0  # of all samples


@dataclasses.dataclass(frozen=True)
class Asked:
    """An op at a shape, for one backend."""

    op: Op
    shape: Any
    case: Case
    backend: Any

    @property
    def gradient(self) -> bool:
        return self.op.name.endswith("gradient")


def measure(name: str, entry: str) -> dict[str, Any]:
    """What a backend does of an entry.

    Raises:
      Skipped: it cannot run it.
      Wrong: its result is too far from what is right.
    """
    op_name, shape_name = entry.split(" @ ")
    op = OPS[op_name]
    if name not in op.backends:
        raise child.Skipped(f"{op_name} has no such backend")
    shape = op.shapes[shape_name]
    case = op.case(shape, DTYPE)
    reason = case.refusal(op.backends[name])
    if reason is not None:
        raise child.Skipped(reason)
    asked = Asked(op, shape, case, op.backends[name])
    operands = jax.block_until_ready(jax.jit(case.make)(jax.random.key(0)))
    program, facts = _compiled(asked, operands)
    found = jax.block_until_ready(program(*operands))
    facts["default"] = _is_default(asked)
    facts["repeats_to_the_bit"] = bool(_same(found, program(*operands)))
    facts |= _compared(asked, operands, found)
    del found
    facts |= _timed(functools.partial(program, *operands), case.flops)
    return _judged(facts)


def _compiled(asked: Asked, operands: tuple) -> tuple[Callable, dict[str, Any]]:
    """The program, how long it took to compile and what it needs beside operands."""
    start = time.perf_counter()
    call = jax.jit(lambda *x: asked.case.call(asked.backend, *x))
    program = call.lower(*operands).compile()
    took = time.perf_counter() - start
    return program, {"compile_s": took, "temporary_bytes": report.check_room(program)}


def _is_default(asked: Asked) -> bool:
    """Whether the op picks this backend here where none is named: the first that can."""
    able = (x for x in asked.op.backends.values() if asked.case.refusal(x) is None)
    return next(able) is asked.backend


@jax.jit
def _same(one: Any, other: Any) -> jax.Array:
    """Whether two results are the same numbers, bit by bit."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return jnp.array([jnp.array_equal(_bits(x), _bits(y)) for x, y in pairs]).all()


def _bits(x: jax.Array) -> jax.Array:
    whole = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, whole)


def _compared(asked: Asked, operands: tuple, found: Any) -> dict[str, Any]:
    """The largest difference to what is right over the largest number that is right: of the output,
    then of each gradient.
    """
    against, flops = _against(asked)
    heads = asked.shape.heads
    chosen = range(heads) if flops <= PATIENCE else sorted({0, heads - 1})
    difference = _difference(asked, against)
    both = [difference(jnp.int32(head), operands, found) for head in chosen]
    # NaN stays NaN.
    off, most = jnp.array(both).max(0).tolist()
    errors = [x / y if y else x for x, y in zip(off, most, strict=True)]
    return {
        "against": f"{against} in float32",
        "heads_compared": len(chosen),
        "error": errors[0],
        "gradient_errors": errors[1:],
        "tolerance": TOLERANCES[0],
        "gradient_tolerance": TOLERANCES[1],
    }


def _against(asked: Asked) -> tuple[str, float]:
    """Which backend says what is right, and its FLOPs over all heads."""
    shape, times = asked.shape, 3.5 if asked.gradient else 1
    rows, n, *_ = shape.queries
    slots = shape.keys[-4] if len(shape.keys) == 6 else 1
    m = slots * shape.keys[-3]
    dense = 4.0 * rows * n * m * shape.width * shape.heads * times
    scores = 4 * SCORES * rows * n * m * (2 if asked.gradient else 1)  # bytes, of one head
    fits = scores <= report.free_memory() / 2
    return ("reference", dense) if fits else ("xla", asked.case.flops)


def _difference(asked: Asked, against: str) -> Callable:
    """A compiled function of a head, operands and a result: of each array of the result the largest
    difference to what is right, and of each the largest number that is right.
    """
    heads = asked.shape.heads
    case = asked.op.case(dataclasses.replace(asked.shape, heads=1), jnp.dtype(jnp.float32))
    call = functools.partial(case.call, asked.op.backends[against])

    def difference(head: jax.Array, operands: tuple, found: Any) -> tuple[list, list]:
        with jax.default_matmul_precision("highest"):
            right = call(*_of_head(operands, heads, head))
        off, most = [], []
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
            off.append(jnp.abs(_numbers(_pick(ours, head)) - theirs).max())
            most.append(jnp.abs(theirs).max())
        return off, most

    return jax.jit(difference)


def _of_head(operands: tuple, heads: int, head: jax.Array) -> tuple:
    """Operands of one head.

    Arrays of heads have them in front of channels, with more axes before: others (`visible`, slots,
    phases) have at most three.
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
    """What is bfloat16 in float32; what is quantised stays so."""
    return x.astype(jnp.float32) if x.dtype == DTYPE else x


def _timed(act: Callable[[], Any], flops: float) -> dict[str, Any]:
    """Milliseconds of a call over some samples, each of calls enough to be measured."""
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
        "tflops": flops / middle / 1e9,  # of what queries see
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
    backend = sys.argv[2]
    child.each(pathlib.Path(sys.argv[1]), sys.argv[3:], functools.partial(measure, backend))
