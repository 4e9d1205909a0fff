"""A training run as a model's folder."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from longlive_jax import config, model, weights
from longlive_jax.convert.source import spec_of
from longlive_jax.convert.table import Pending
from longlive_jax.errors import InputError
from longlive_jax.output import check_new_folder
from longlive_jax.train.checkpoint import Checkpoints


def run(workdir: pathlib.Path, output: pathlib.Path) -> int:
    """Writes the averaged transformer of a run's last checkpoint, with the other parts of the model
    that the run began with, as the new folder `output`; it streams as the run says, in the steps
    that it was distilled to. Weights have the types of that model's files. Returns the checkpoint's
    step.

    Raises:
      InputError: there is no checkpoint, it or the model cannot be read, what was learned is a
        LoRA, or `output` is there.
    """
    check_new_folder(output)
    folder = workdir.absolute() / "checkpoints"
    if not folder.is_dir():
        raise InputError(f"{workdir} holds no training run")
    checkpoints = Checkpoints(folder)
    try:
        step = checkpoints.latest
        if step is None:
            raise InputError(f"the run in {workdir} has no checkpoint yet")
        began = checkpoints.config(step)
        if _rank(began):
            raise InputError(
                f"the run in {workdir} learns a LoRA, which it leaves in lora.safetensors:"
                " `longlive merge-lora` adds that to a model"
            )
        source = model.folder_of(began["model"])
        tensors = weights.read(source, "dit")
        specs = {path: spec_of(tensors, path) for path in tensors}
        like = {path: jax.ShapeDtypeStruct(spec.shape, np.float32) for path, spec in specs.items()}
        averaged = checkpoints.ema(step, like)
    finally:
        checkpoints.close()
    given = config.to_json(model.read_config(source))
    changed = {name: began[name] for name in ("steps", "timesteps") if began.get(name)}
    # Which kernel attends is a matter of where the run was.
    stream = began.get("ar", began)["stream"] | {"attention": "best"}
    cfg = config.from_json(given | {"stream": stream, "sampler": given["sampler"] | changed})
    pending = {
        path: Pending(spec.shape, spec.dtype, functools.partial(_whole, averaged[path], spec.dtype))
        for path, spec in specs.items()
    }
    model.write_with(output, source, pending, cfg)
    return step


def _rank(began: dict[str, Any]) -> int:
    """Of the student's LoRA; 0 where all weights are learned, and in runs without a student."""
    return began["student"]["learning"]["rank"] if "student" in began else 0


def _whole(x: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    yield x.astype(dtype)
