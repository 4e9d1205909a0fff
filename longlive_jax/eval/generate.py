"""Batches of videos for an evaluation suite, from the same programs that serve one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from longlive_jax import rollout
from longlive_jax.dit.model import TextKV
from longlive_jax.eval.toy_suite import Job, Video
from longlive_jax.model import Model
from longlive_jax.rollout import Rollout
from longlive_jax.vae.vae import init_carry


def generator(
    model: Model, *, steps: int | None = None, batch: int = 16
) -> Callable[[Sequence[Job]], Iterator[Video]]:
    """A callable that makes the videos of jobs, `batch` at a time, in their order.

    Videos of one batch are as long as each other. Where only some of them have an event at a chunk,
    a row that has none is given the prompt that it already has, and keeps the memory that it has.
    """
    solver = model.solver(steps)

    def generate(jobs: Sequence[Job]) -> Iterator[Video]:
        for i in range(0, len(jobs), batch):
            group = list(jobs[i : i + batch])
            rows = group + [group[-1]] * (batch - len(group))  # one compiled shape
            yield from _play(model, rows, solver)[: len(group)]

    return generate


def _play(model: Model, jobs: Sequence[Job], solver) -> np.ndarray:
    config, prompts = model.config, [job.events[0][2] for job in jobs]
    text, videos = model.prompt_kv(prompts), []
    memory = rollout.begin(config, [job.seed for job in jobs], text.k.dtype)
    carry = init_carry(model.vae, len(jobs), config.height, config.width)
    stream, guidance = config.stream, config.sampler.guidance
    for chunk in range(jobs[0].chunks):
        for kind in ("cut", "switch"):
            told = [_event(job, chunk, kind) for job in jobs]
            if chunk and any(told):
                prompts = [new or old for new, old in zip(told, prompts, strict=True)]
                rows, text = jnp.array([new is not None for new in told]), model.prompt_kv(prompts)
                memory = _changed(model, memory, kind, text, rows)
        noise = rollout.noise(memory, stream.chunk)
        choices = dict(stream=stream, solver=solver, guidance=guidance)
        memory, latents = rollout.generate(model.dit, memory, text, noise, **choices)
        carry, pixels = rollout.decode(model.vae, carry, latents, first=chunk == 0)
        videos.append(np.asarray(jax.block_until_ready(pixels)))
    return np.concatenate(videos, 1)


def _changed(
    model: Model, memory: Rollout, kind: str, text: TextKV, rows: Bool[Array, " b"]
) -> Rollout:
    """`rows` have a new prompt; the others keep the memory that they have."""
    if kind == "cut":
        return dataclasses.replace(memory, shot=memory.shot + rows.astype(jnp.int32))
    stream = model.config.stream
    return rollout.recache(model.dit, memory, text, rows, stream=stream, how=stream.recache)


def _event(job: Job, chunk: int, kind: str) -> str | None:
    said = [text for at, what, text in job.events if (at, what) == (chunk, kind)]
    return said[0] if said else None
