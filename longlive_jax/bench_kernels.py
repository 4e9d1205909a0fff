"""How fast kernels are, and whether the best one is the default; `longlive bench --suite kernels`.

Everything that is compared is measured in the same run: backends take turns, and what they are held
against is a large product and a large copy on the same device.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from longlive_jax import bench_compile, bench_kernels_table, interrupts, report
from longlive_jax.bench_ops import OPS, Case, Op
from longlive_jax.errors import InputError

NEAR = 1.05  # of the best other backend's time: the default may take as long
SLOW = 10  # times what its size takes at the peaks: about what a small call takes on a CPU
SHAPES = ("all", "small")


@dataclasses.dataclass(frozen=True)
class Effort:
    """side: of the large product. copied: bytes of the large copy. budget_s: for one call: on a CPU
    what would take longer, by its FLOPs, is not run, elsewhere it is timed once. sample_s: calls
    are repeated until they take so long together. queued: whether only the last of them is waited
    for, where calls run one after the other; on a CPU they may overlap.
    """

    side: int
    copied: int
    budget_s: float
    sample_s: float
    queued: bool


CPU = Effort(side=2048, copied=1 << 28, budget_s=0.1, sample_s=0.02, queued=False)
GPU = Effort(side=8192, copied=1 << 30, budget_s=2.0, sample_s=0.02, queued=True)


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What the device does at best, measured before and after the kernels. side: of the square
    product. copied: bytes.
    """

    flops: dict[str, float]  # a second, of one product, by type
    bandwidth: float  # bytes a second, read and written, of one copy
    side: int
    copied: int

    def best(self, other: Peaks) -> Peaks:
        """Of two measurements; what else the machine was doing slows them."""
        flops = {name: max(x, other.flops[name]) for name, x in self.flops.items()}
        bandwidth = max(self.bandwidth, other.bandwidth)
        return dataclasses.replace(self, flops=flops, bandwidth=bandwidth)


@dataclasses.dataclass(frozen=True)
class Row:
    """One backend at one shape. Seconds are of a call; where `refused` says why it did not run,
    numbers are None. failed: it did not although it supports the call.
    """

    op: str
    shape: str
    backend: str
    dtype: str
    refused: str
    compiles: dict[str, str]  # by GPU: "ok", or why not
    median_s: float | None = None
    best_s: float | None = None
    tflops: float | None = None  # by the median; of matrix products
    gbps: float | None = None  # of what must be read and written once
    of_product: float | None = None  # of the measured peaks
    of_copy: float | None = None
    # Other's time / own; 1 where both are the same program.
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    failed: bool = False


@dataclasses.dataclass(frozen=True)
class Default:
    """Whether the backend that an op picks is the right one at a shape. ratio: its time over the
    best other's; None where no other ran, or it failed where others ran.
    """

    op: str
    shape: str
    default: str
    ratio: float | None
    within: bool  # `NEAR` of the best other


@dataclasses.dataclass(frozen=True)
class KernelsReport(report.Head):
    """Of all ops that were asked for. Every backend was compiled and called before it was timed."""

    shapes: str  # "all"; "small": those that fit `budget_s`
    budget_s: float  # of one call, by its FLOPs
    repeats: int
    peaks: Peaks
    rows: tuple[Row, ...]
    defaults: tuple[Default, ...]
    defaults_within: bool  # all of them
    left_out: dict[str, tuple[str, ...]]  # shapes, by op

    def tables(self) -> list[Table]:
        return bench_kernels_table.tables(self)


def run(*, op: str | None, shapes: str | None, repeat: int, seed: int) -> KernelsReport:
    """Measures kernels on the default device.

    Args:
      op: A name in `bench_ops.OPS`, or else the beginning of some; None is all.
      shapes: One of `SHAPES`; None is all on an accelerator, on a CPU what fits its budget.
      repeat: Rounds, in each of which every backend is timed once.
      seed: Of the operands.

    Raises:
      InputError: there is no such op.
    """
    begun = [row for name, row in OPS.items() if name.startswith(op or "")]
    chosen = [OPS[op]] if op in OPS else begun
    if not chosen:
        raise InputError(f'--op "{op}" is not known: say {", ".join(OPS)}')
    on_cpu = jax.default_backend() == "cpu"
    shapes, effort = shapes or SHAPES[on_cpu], CPU if on_cpu else GPU
    dtype = jnp.dtype(jnp.float32 if on_cpu else jnp.bfloat16)
    peaks = measured_peaks(effort)
    found, left = [], {}
    for row in chosen:
        cases = {name: row.case(shape, dtype) for name, shape in row.shapes.items()}
        large = {name for name, case in cases.items() if slow(case, peaks, dtype, effort)}
        if large:
            left[row.name] = tuple(name for name in cases if name in large)
        if shapes == "small":
            cases = {name: case for name, case in cases.items() if name not in large}
        said = compile_verdicts(row, list(cases))
        for name, case in cases.items():
            timer = None if name in large and on_cpu else Timer(case, repeat, seed, effort)
            found.append((row.name, name, case, outcomes(row, case, timer), said))
    peaks = peaks.best(measured_peaks(effort))
    rows = [x for measured in found for x in case_rows(*measured, peaks, dtype)]
    picked = tuple(defaults(rows))
    return KernelsReport(
        **report.head("kernels", None, seed),
        shapes=shapes,
        budget_s=effort.budget_s,
        repeats=repeat,
        peaks=peaks,
        rows=tuple(rows),
        defaults=picked,
        defaults_within=all(x.within for x in picked),
        left_out=left if shapes == "small" or on_cpu else {},
    )


def seconds_of(act: Callable[[], Any], calls: int = 1, queued: bool = False) -> float:
    """Of one of so many calls in a row, results waited for."""
    start = time.perf_counter()
    for left in reversed(range(calls)):
        made = act()
        if not queued or not left:
            jax.block_until_ready(made)
    return (time.perf_counter() - start) / calls


def measured_peaks(effort: Effort) -> Peaks:
    """The best of five products in each type, and of five copies, timed as kernels are."""

    def best(function: Callable, *operands: Any) -> float:
        program = jax.jit(function).lower(*operands).compile()
        act = functools.partial(program, *operands)
        jax.block_until_ready(act())
        calls = calls_of(act, effort)
        return min(seconds_of(act, calls, effort.queued) for _ in range(5))

    flops = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        x = jax.random.normal(jax.random.key(0), (effort.side,) * 2, dtype)
        flops[jnp.dtype(dtype).name] = 2 * effort.side**3 / best(jnp.matmul, x, x)
    x = jnp.ones(effort.copied // 4)
    bandwidth = 2 * effort.copied / best(lambda x: x + 1, x)
    return Peaks(flops, bandwidth, effort.side, effort.copied)


def calls_of(act: Callable[[], Any], effort: Effort) -> int:
    """How many are timed together."""
    return max(1, min(1000, int(effort.sample_s / seconds_of(act))))


def slow(case: Case, peaks: Peaks, dtype: Any, effort: Effort) -> bool:
    """Whether a call would take longer than the budget, as far as its size tells."""
    expected = case.flops / peaks.flops[dtype.name] + case.nbytes / peaks.bandwidth
    return SLOW * expected > effort.budget_s


def compile_verdicts(row: Op, shapes: Sequence[str]) -> dict[str, Mapping | str]:
    """By GPU: by shape and backend, or why nothing was compiled."""
    missing = bench_compile.missing()
    if missing or not shapes:
        return dict.fromkeys(bench_compile.GPUS, missing)
    return {gpu: bench_compile.verdicts(gpu, row.name, shapes) for gpu in bench_compile.GPUS}


@dataclasses.dataclass(frozen=True)
class Unrun:
    """Why there are no times. failed: the backend supports the call."""

    why: str
    failed: bool = False


Outcome = list[float] | Unrun  # seconds of calls


@dataclasses.dataclass(frozen=True)
class Timer:
    """Times the backends of a case in turns. Those that are the same program are timed as one."""

    case: Case
    repeat: int
    seed: int
    effort: Effort

    def times(self, backends: Mapping[str, Any]) -> dict[str, Outcome]:
        """Seconds of each call, or why it did not run."""
        operands = jax.jit(self.case.make)(jax.random.key(self.seed))
        found: dict[str, Outcome] = {}
        runs: dict[str, Callable[[], Any]] = {}  # by what the program says
        says: dict[str, str] = {}
        for name, backend in backends.items():
            interrupts.stop.check()
            try:
                text, program = self._program(backend, operands)
            except Exception as error:  # noqa: BLE001  # of one backend: a row, not the end
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                found[name] = Unrun(why, failed=True)
            else:
                says[name] = text
                runs.setdefault(text, functools.partial(program, *operands))
        times = self._turns(runs)
        return found | {name: times[text] for name, text in says.items()}

    def _turns(self, runs: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
        calls = {name: calls_of(act, self.effort) for name, act in runs.items()}
        found: dict[str, list[float]] = {}
        for _ in range(self.repeat):
            for name, act in runs.items():
                if name not in found or found[name][0] < self.effort.budget_s:
                    took = seconds_of(act, calls[name], self.effort.queued)
                    found.setdefault(name, []).append(took)
        return found

    def _program(self, backend: Any, operands: tuple) -> tuple[str, Callable]:
        """What a call is, all constants included; and compiled, called once."""
        lowered = jax.jit(lambda *x: self.case.call(backend, *x)).lower(*operands)
        program = lowered.compile()
        report.check_room(program)
        jax.block_until_ready(program(*operands))
        return lowered.as_text(), program


def outcomes(row: Op, case: Case, timer: Timer | None) -> dict[str, Outcome]:
    """Of each backend. timer: None where the shape is too large to be run here."""
    refused = {name: case.refusal(backend) for name, backend in row.backends.items()}
    if timer is None:
        return {name: Unrun(why or "too large to be run here") for name, why in refused.items()}
    able = {name: row.backends[name] for name, why in refused.items() if not why}
    times = timer.times(able) if able else {}
    return {name: Unrun(why) if why else times[name] for name, why in refused.items()}


def case_rows(
    op: str,
    shape: str,
    case: Case,
    found: Mapping[str, Outcome],
    said: Mapping[str, Mapping | str],
    peaks: Peaks,
    dtype: Any,
) -> list[Row]:
    """A row for each backend."""
    medians = {name: statistics.median(x) for name, x in found.items() if isinstance(x, list)}
    made = []
    for name, outcome in found.items():
        compiles = {
            gpu: x if isinstance(x, str) else x.get((shape, name), "") for gpu, x in said.items()
        }
        one = Row(op, shape, name, dtype.name, "", compiles)
        if isinstance(outcome, Unrun):
            one = dataclasses.replace(one, refused=outcome.why, failed=outcome.failed)
        else:
            flops, nbytes = case.flops / medians[name], case.nbytes / medians[name]
            others = [other for other in medians if other != name]
            one = dataclasses.replace(
                one,
                median_s=medians[name],
                best_s=min(outcome),
                tflops=flops / 1e12,
                gbps=nbytes / 1e9,
                of_product=flops / peaks.flops[dtype.name],
                of_copy=nbytes / peaks.bandwidth,
                ratios={other: in_turns(found[other], outcome) for other in others},
            )
        made.append(one)
    return made


def in_turns(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Their time over ours, the median of all rounds: what slows the machine for longer than one
    slows both.
    """
    if len(theirs) != len(ours):  # one of them takes too long to be timed again
        return statistics.median(theirs) / statistics.median(ours)
    return statistics.median(x / y for x, y in zip(theirs, ours, strict=True))


def defaults(rows: Sequence[Row]) -> list[Default]:
    """The check of the dispatcher: of the backends that support a call, the first in the op's list
    is its default. One that fails where another runs is not the right one.
    """
    found = []
    for op, shape in dict.fromkeys((row.op, row.shape) for row in rows):
        able = [
            row
            for row in rows
            if (row.op, row.shape) == (op, shape) and (row.failed or row.median_s is not None)
        ]
        if all(row.failed for row in able):
            continue
        first = able[0]
        ratio = 1 / min(first.ratios.values()) if first.ratios else None
        within = not first.failed and (ratio is None or ratio <= NEAR)
        found.append(Default(op, shape, first.backend, ratio, within))
    return found
