"""Batches of videos for an evaluation suite, from the same programs that serve one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from longlive_jax import session
from longlive_jax.eval.toy_suite import Job, Video
from longlive_jax.model import Model


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
    prompts = [job.events[0][2] for job in jobs]
    text, videos = model.prompt_kv(prompts), []
    kept = dict(batch=len(jobs), seed=jobs[0].seed, dtype=text.k.dtype)
    state = session.begin(model.config, model.vae, **kept)
    for chunk in range(jobs[0].chunks):
        for kind in ("cut", "switch"):
            told = [_event(job, chunk, kind) for job in jobs]
            if chunk and any(told):
                prompts = [new or old for new, old in zip(told, prompts, strict=True)]
                rows = np.array([new is not None for new in told])
                state, text = model.change(state, kind, prompts, rows)
        state, latents = model.next_latents(state, text, solver)
        state, pixels = session.decode(model.vae, state, latents, first=chunk == 0)
        videos.append(np.asarray(jax.block_until_ready(pixels)))
    return np.concatenate(videos, 1)


def _event(job: Job, chunk: int, kind: str) -> str | None:
    said = [text for at, what, text in job.events if (at, what) == (chunk, kind)]
    return said[0] if said else None
