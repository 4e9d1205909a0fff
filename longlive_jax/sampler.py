"""Samplers: from noise to a clean chunk in a few evaluations of a velocity field.

Every solver here is linear in what it has seen, so a solver is a list of steps, and a step is a few
coefficients, worked out in float64 before anything is traced. One loop serves them all. At noise
level sigma, with x0 the clean video that the velocity at (x, t) points at, and a prime for what the
step before had in its place:

    x0    = x - sigma v(x, t)
    start = correct . (x, start', x0, x0', x0'')     x, unless the solver corrects it
    x     = predict . (start, x0, x0', noise)        at the next noise level

From sigma to next, rectified flow along a constant x0 is the straight line r x + (1 - r) x0 with
r = next / sigma. Solvers follow that line (Euler), add differences of x0 to it (UniPC,
DPM-Solver++), or replace `start` by fresh noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longlive_jax.config import SamplerConfig
from longlive_jax.flow import TRAIN_STEPS, Flow, shift

Latents = Float[Array, "b f h w c"]
Velocity = Callable[[Array, Array], Array]  # x, timestep -> v
StatefulVelocity = Callable[[Array, Array, Any], tuple[Array, Any]]
Renoise = Callable[[Array], Array]  # step that receives it -> noise

KEEP = (1.0, 0.0, 0.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Step:
    """One evaluation of the model, and what is made of it."""

    timestep: float  # what the model is told, 0 … 1000
    sigma: float
    correct: tuple[float, ...]  # of x, start', x0, x0', x0''
    predict: tuple[float, ...]  # of start, x0, x0', noise


@dataclasses.dataclass(frozen=True)
class Solver:
    """The steps from noise to clean. A hashable value: it may be a static argument."""

    steps: tuple[Step, ...]

    @property
    def rows(self) -> tuple[np.ndarray, ...]:
        """timestep [n], sigma [n], correct [n 5], predict [n 4] in float32, to scan over."""
        columns = zip(*(dataclasses.astuple(step) for step in self.steps), strict=True)
        return tuple(np.asarray(column, np.float32) for column in columns)

    @property
    def renoises(self) -> bool:
        return any(step.predict[3] for step in self.steps)


def make(cfg: SamplerConfig) -> Solver:
    """The solver that a config names.

    Raises: ValueError for an unknown solver, no steps, or an impossible list of timesteps.
    """
    solvers = {"dpmpp": dpmpp, "euler": euler, "renoise": renoise, "unipc": unipc}
    if cfg.solver not in solvers:
        raise ValueError(f"solver {cfg.solver!r}: choose one of {', '.join(solvers)}")
    if cfg.steps < 1:
        raise ValueError(f"a sampler takes at least 1 step, not {cfg.steps}")
    if cfg.timesteps and cfg.solver != "renoise":
        raise ValueError(f"the {cfg.solver} solver places its own timesteps")
    return solvers[cfg.solver](cfg)


def euler(cfg: SamplerConfig) -> Solver:
    """Straight lines between shifted levels of an even grid from 1 to 0."""
    sigmas = shift(np.linspace(1.0, 0.0, cfg.steps + 1), cfg.shift)
    return _solver(TRAIN_STEPS * sigmas[:-1], sigmas, [_line(*pair) for pair in _pairs(sigmas)])


def renoise(cfg: SamplerConfig) -> Solver:
    """LongLive 1.0: jump to x0, put fresh noise of the next level on it (`causal_inference.py`).

    Timesteps count down from 1000, evenly spaced if the config lists none. Warped, they are places
    in the shifted table: 1000, 750, 500, 250 at shift 5 are 1000, 937.5, 833.3, 625.
    """
    flow = Flow(cfg.shift)
    spaced = tuple(int(t) for t in np.linspace(TRAIN_STEPS, 0, cfg.steps + 1)[:-1])
    timesteps = cfg.timesteps or spaced
    _check(timesteps, cfg.steps)
    places = TRAIN_STEPS - np.asarray(timesteps)
    t = flow.timesteps[places] if cfg.warp else np.asarray(timesteps, np.float64)
    nearest = np.argmin(np.abs(flow.timesteps - t[:, None]), axis=1)
    sigmas = np.append(flow.sigmas[nearest], 0.0)
    return _solver(t, sigmas, [(0.0, 1.0 - s, 0.0, s) for s in sigmas[1:]])


def unipc(cfg: SamplerConfig) -> Solver:
    """LongLive 2.0: UniPC, order 2, B2(h), on x0 (arXiv 2302.04867; `fm_solvers_unipc.py`).

    The first and the last step are of order 1. From the second step on, the new evaluation first
    corrects the point it was made at. The grid starts at 0.999, and the model is told the integer
    part of the timestep.
    """
    u = np.linspace(1.0 - 1.0 / TRAIN_STEPS, 0.0, cfg.steps + 1)
    sigmas = shift(u, cfg.shift)
    spans, ratios = _spans(sigmas)
    predict, correct = [], [KEEP]
    for k, (here, after) in enumerate(_pairs(sigmas)):
        predict.append(_predictor(here, after, ratios[k]))
        if k + 1 < cfg.steps:
            correct.append(_corrector(here, after, spans[k], ratios[k]))
    return _solver(np.trunc(TRAIN_STEPS * sigmas[:-1]), sigmas, predict, correct)


def dpmpp(cfg: SamplerConfig) -> Solver:
    """DPM-Solver++(2M), midpoint, on x0 (arXiv 2211.01095; `fm_solvers.py`).

    UniPC's predictor alone: at order 2 they agree. The grid starts at exactly 1, so that the step
    before the second one spans an infinite log SNR, and its difference of x0 counts for nothing.
    The model is told the integer part of the timestep.
    """
    sigmas = shift(np.linspace(1.0, 0.0, cfg.steps + 1), cfg.shift)
    predict = [
        _predictor(here, after, ratio)
        for (here, after), ratio in zip(_pairs(sigmas), _spans(sigmas)[1], strict=True)
    ]
    return _solver(np.trunc(TRAIN_STEPS * sigmas[:-1]), sigmas, predict)


def _spans(sigmas: np.ndarray) -> tuple[np.ndarray, list[float | None]]:
    """What every step adds to half the log SNR [n], and the ratio that `_predictor` takes of each.

    Infinite from noise alone, and to the clean end. The first and the last step are of order 1.
    """
    with np.errstate(divide="ignore"):
        spans = np.diff(np.log1p(-sigmas) - np.log(sigmas))
    inner = (-spans[:-2] / spans[1:-1]).tolist()
    return spans, [None, *inner, None][: len(spans)]


def _predictor(here: float, after: float, ratio: float | None) -> tuple[float, ...]:
    """UniP: the line, plus half the last difference of x0, scaled from its step to this one.

    ratio: the log-SNR span of the step before over that of this one, negative. None is order 1.
    """
    line = _line(here, after)
    if ratio is None:
        return line
    slope = 0.5 * line[1] / ratio
    return (line[0], line[1] - slope, slope, 0.0)


def _corrector(here: float, after: float, span: float, ratio: float | None) -> tuple[float, ...]:
    """UniC: the line from `start'`, plus weighted differences to x0' of x0 and x0''.

    The weights solve the order conditions w1 + w0 = b1, ratio w1 + w0 = b2.
    """
    kept, moved, *_ = _line(here, after)
    if ratio is None:
        return (0.0, kept, 0.5 * moved, 0.5 * moved, 0.0)
    h = -span
    phi1 = np.expm1(h) / h
    phi2 = (phi1 - 1.0) / h
    b1, b2 = (phi1 - 1.0) / np.expm1(h), 2.0 * (phi2 - 0.5) / np.expm1(h)
    w1 = (b1 - b2) / (1.0 - ratio)
    new, old = moved * (b1 - w1), moved * w1 / ratio
    return (0.0, kept, new, moved - new - old, old)


def sample(solver: Solver, velocity: Velocity, noise: Latents, renoise: Renoise) -> Latents:
    """Denoises one chunk; traceable, so it may run inside `jax.jit`.

    velocity: (x, t) -> v, with t a float32 scalar, 0 … 1000.
    renoise: step -> fresh noise for that step's x, 1 ≤ step < len(solver.steps), like `noise`;
        only asked by solvers that renoise.
    """
    carrying = lambda x, t, state: (velocity(x, t), state)  # noqa: E731
    return sample_stateful(solver, carrying, noise, renoise, None)[0]


def sample_stateful(
    solver: Solver, velocity: StatefulVelocity, noise: Latents, renoise: Renoise, state: Any
) -> tuple[Latents, Any]:
    """`sample` with a velocity (x, t, state) -> (v, state).

    A KV cache carried as state is updated in place; one that a velocity closes over is copied for
    every step. Updates are in float32; the model sees the dtype of `noise`.
    """
    last = len(solver.steps) - 1

    def step(carry, row):
        progress, state = carry
        index, timestep, *row = row
        v, state = velocity(progress.x.astype(noise.dtype), timestep, state)
        fresh = None
        if solver.renoises:  # the last step's coefficient is 0: any step's noise does
            fresh = renoise(jnp.minimum(index + 1, last))
        return (advance(progress, v, *row, fresh), state), None

    indices = jnp.arange(last + 1, dtype=jnp.int32)
    (progress, state), _ = jax.lax.scan(step, (begin(noise), state), (indices, *solver.rows))
    return progress.x.astype(noise.dtype), state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """A chunk on its way, in float32: what the model is shown next, and what the solver remembers
    of the steps before.
    """

    x: Latents
    start: Latents
    x0: Latents
    x0_old: Latents


def begin(noise: Latents) -> Progress:
    zero = jnp.zeros(noise.shape, jnp.float32)
    return Progress(noise.astype(jnp.float32), zero, zero, zero)


def advance(
    at: Progress,
    v: Latents,
    sigma: Float[Array, ""],
    correct: Float[Array, " 5"],
    predict: Float[Array, " 4"],
    fresh: Latents | None = None,
) -> Progress:
    """After one evaluation, `v` at `at.x`: a row of `Solver.rows` but the timestep, and fresh noise
    for solvers that put it on.
    """
    new = at.x - sigma * v.astype(jnp.float32)
    start = _blend(correct, (at.x, at.start, new, at.x0, at.x0_old))
    seen = (start, new, at.x0)
    if fresh is not None:
        seen += (fresh.astype(jnp.float32),)
    return Progress(_blend(predict, seen), start, new, at.x0)


def _blend(weights: Float[Array, " n"], terms: tuple[Array, ...]) -> Array:
    return sum((weights[i] * term for i, term in enumerate(terms)), start=jnp.float32(0.0))


def draws(
    key: jax.Array, chunk: int | Int[Array, ""], shape: tuple[int, ...], dtype: Any = jnp.float32
) -> Renoise:
    """Noise as a function of (key, chunk, step), never of call order. Step 0 starts a chunk."""
    key = jax.random.fold_in(key, chunk)
    return lambda step: jax.random.normal(jax.random.fold_in(key, step), shape, dtype)


def guided(velocity: Velocity, unconditional: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance (arXiv 2207.12598; `causal_diffusion_inference.py`).

    At scale 1 the unconditional branch is not evaluated.
    """
    if scale == 1.0:
        return velocity
    return lambda x, t: guide(velocity(x, t), unconditional(x, t), scale)


def guide(
    v: Float[Array, "*shape"], unconditional: Float[Array, "*shape"], scale: float
) -> Float[Array, "*shape"]:
    """unconditional + scale (v - unconditional), for callers that carry two states."""
    return unconditional + scale * (v - unconditional)


def _line(here: float, after: float) -> tuple[float, ...]:
    r = after / here
    return (r, 1.0 - r, 0.0, 0.0)


def _pairs(sigmas: np.ndarray) -> list[tuple[float, float]]:
    return list(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True))


def _solver(timesteps, sigmas, predict, correct=None) -> Solver:
    rows = zip(timesteps, sigmas[:-1], correct or [KEEP] * len(predict), predict, strict=True)
    floats = lambda row: tuple(float(x) for x in row)  # noqa: E731
    return Solver(tuple(Step(float(t), float(s), floats(c), floats(p)) for t, s, c, p in rows))


def _check(timesteps: tuple[int, ...], steps: int) -> None:
    if len(timesteps) != steps:
        raise ValueError(f"{len(timesteps)} timesteps are listed for {steps} steps")
    falling = all(a > b for a, b in zip(timesteps, timesteps[1:], strict=False))
    if not falling or timesteps[0] > TRAIN_STEPS or timesteps[-1] < 1:
        raise ValueError(f"timesteps must fall within {TRAIN_STEPS} … 1, not {timesteps}")
