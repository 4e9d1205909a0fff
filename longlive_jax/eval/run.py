"""`longlive eval`: a suite on a model, with what is needed to run it again."""

from __future__ import annotations

from typing import Any

from longlive_jax import report
from longlive_jax.eval import drift as drifting
from longlive_jax.eval import switching, toy_suite
from longlive_jax.eval.generate import generator
from longlive_jax.eval.reconstruct import reconstructor
from longlive_jax.model import Model


def toy(model: Model, *, steps: int | None, seed: int, **sizes: int) -> dict[str, Any]:
    """The toy suite's scores and baselines, and the model, steps, seed and versions they belong to.

    Args:
      model: A model of the toy world.
      steps: Denoising steps; None is the model's own number.
      seed: Of prompts and videos.
      **sizes: `prompts`, `per_unseen`, `minutes` of `toy_suite.evaluate`; its own by default.
    """
    scores = toy_suite.evaluate(
        generator(model, steps=steps),
        seed=seed,
        reconstruct=reconstructor(model.config, model.vae),
        **sizes,
    )
    return _labelled("toy", model, steps, seed) | scores


def switch(model: Model, *, steps: int | None, seed: int, **sizes: int) -> dict[str, Any]:
    """The same for the suite of switches and cuts; `count` is how many, 112 by default."""
    scores = switching.evaluate(
        switching.player(model, steps=steps),
        seed=seed,
        reconstruct=reconstructor(model.config, model.vae),
        **sizes,
    )
    return _labelled("switch", model, steps, seed) | scores


def drift(model: Model, *, steps: int | None, seed: int, **sizes: float | int) -> dict[str, Any]:
    """The same for long videos of one prompt; `seconds` is how long, `videos` how many."""
    scores = drifting.evaluate(
        generator(model, steps=steps),
        seed=seed,
        reconstruct=reconstructor(model.config, model.vae),
        **sizes,
    )
    return _labelled("drift", model, steps, seed) | scores


def _labelled(suite: str, model: Model, steps: int | None, seed: int) -> dict[str, Any]:
    return {
        "suite": suite,
        "model": model.config.name,
        "steps": steps or model.config.sampler.steps,
        "seed": seed,
        "versions": report.versions(),
    }
