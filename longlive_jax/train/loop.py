"""The loop that every run goes through: step, report, save, sample; stopped at any time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longlive_jax import sharding
from longlive_jax.errors import InputError
from longlive_jax.train.checkpoint import Checkpoints
from longlive_jax.train.metrics import Metrics

State = TypeVar("State")
Found = dict[str, jax.Array]  # of one step: losses, and norms of gradients ("norm", "…_norm")


class Stopped(InputError):
    """Training cannot go on: the loss or its gradient is no number."""


@dataclasses.dataclass(frozen=True)
class Every:
    """How many steps a run has, and steps between reports, checkpoints and samples; 0 is never."""

    steps: int
    log: int
    save: int
    sample: int = 0

    def due(self, step: int, every: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.steps)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a run does. step: of a state and its number. save, sample: of a state. rate: of seconds
    a step.
    """

    step: Callable[[Any, int], tuple[Any, Found]]
    save: Callable[[Any], None]
    sample: Callable[[Any, int], None] = lambda state, step: None
    rate: Callable[[float], dict[str, float]] = lambda seconds: {"step_s": seconds}


def run(
    state: State,
    work: Work,
    every: Every,
    *,
    told: list[int],
    mesh: Mesh,
    to: Metrics,
    checkpoints: Checkpoints,
) -> State:
    """Goes on from `state.step` until the last step, or until the process is told to end, which
    saves the run.

    Raises:
      Stopped: a loss is no number.
    """
    step, counted, since = int(state.step), 0, time.perf_counter()
    found: list[Found] = []  # of the steps that are not yet checked
    ends = anywhere(told, mesh)
    while step < every.steps and not ends():
        ends = anywhere(told, mesh)
        state, numbers = work.step(state, step)
        found.append(numbers)
        step, counted = step + 1, counted + 1
        logs, saves, samples = (every.due(step, n) for n in (every.log, every.save, every.sample))
        if logs or saves or samples:
            values = _checked(found, step, checkpoints)
        if logs:
            to.write(step, values | work.rate((time.perf_counter() - since) / counted))
        if saves:
            work.save(state)
        if samples:
            work.sample(state, step)
        if logs or samples:
            counted, since = 0, time.perf_counter()
    if step < every.steps:
        logging.info("told to end: saving step %d", step)
        _checked(found, step, checkpoints)
        work.save(state)
    checkpoints.wait()
    return state


def _checked(found: list[Found], step: int, checkpoints: Checkpoints) -> dict[str, float]:
    """The newest of every number. Nothing is saved of a step before it is checked: with a gradient
    that is no number the weights are none either.
    """
    values: dict[str, float] = {}
    for number, numbers in enumerate(jax.device_get(found), step - len(found) + 1):
        for name, value in numbers.items():
            values[name] = float(value)
            if not math.isfinite(values[name]):
                raise _stopped(_words(name, number, values[name]), checkpoints)
    found.clear()
    return values


def _words(name: str, step: int, value: float) -> str:
    what, _, kind = name.rpartition("_")
    if "norm" not in (kind, name):
        return f"the {name} of step {step} is {value}"
    of = f"{what}'s gradient" if what else "gradient"
    return f"the {of} of step {step} has the norm {value}"


def _stopped(reason: str, checkpoints: Checkpoints) -> Stopped:
    checkpoints.wait()
    last, folder = checkpoints.latest, checkpoints.folder
    kept = "no checkpoint is" if last is None else f"the last checkpoint, of step {last}, is"
    return Stopped(f"{reason}; {kept} in {folder}")


def anywhere(told: list[int], mesh: Mesh) -> Callable[[], bool]:
    """Whether this process was told to end. Of several, whether any had been when this was called,
    and the same answer in all: they must leave after the same step. The answer comes from the
    devices; it is asked for before a step begins and looked at after that.
    """
    if jax.process_count() == 1:
        return lambda: bool(told)
    each = NamedSharding(mesh, PartitionSpec(sharding.AXES))
    one = np.full(1, bool(told))
    flags = jax.make_array_from_callback((mesh.size,), each, lambda _: one)
    answer = _any(flags, NamedSharding(mesh, PartitionSpec()))
    return lambda: bool(answer)


@functools.partial(jax.jit, static_argnums=1)
def _any(flags: jax.Array, place: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(flags.any(), place)


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """A list that is empty until the process is told to end."""
    told: list[int] = []
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.signal(kind, lambda number, _: told.append(number)) for kind in kinds}
    try:
        yield told
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
