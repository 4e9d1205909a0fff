"""A training run as a model's folder."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator

import jax
import numpy as np

from longlive_jax import config, model, weights
from longlive_jax.convert.source import spec_of
from longlive_jax.convert.table import Pending
from longlive_jax.errors import InputError
from longlive_jax.train.checkpoint import Checkpoints


def run(workdir: pathlib.Path, output: pathlib.Path) -> int:
    """Writes the averaged transformer of a run's last checkpoint, with the other parts of the model
    that the run began with, as the new folder `output`; it streams as the run says. Weights have
    the types of that model's files. Returns the checkpoint's step.

    Raises:
      InputError: there is no checkpoint, it or the model cannot be read, or `output` is there.
    """
    weights.check_new(output)
    folder = workdir.absolute() / "checkpoints"
    if not folder.is_dir():
        raise InputError(f"{workdir} holds no training run")
    checkpoints = Checkpoints(folder)
    try:
        step = checkpoints.latest
        if step is None:
            raise InputError(f"the run in {workdir} has no checkpoint yet")
        began = checkpoints.config(step)
        source = model.folder_of(began["model"])
        tensors = weights.read(source, "dit")
        specs = {path: spec_of(tensors, path) for path in tensors}
        like = {path: jax.ShapeDtypeStruct(spec.shape, np.float32) for path, spec in specs.items()}
        averaged = checkpoints.ema(step, like)
    finally:
        checkpoints.close()
    given = config.to_json(model.read_config(source))
    cfg = config.from_json(given | {"stream": began["ar"]["stream"]})
    pending = {
        path: Pending(spec.shape, spec.dtype, functools.partial(_whole, averaged[path], spec.dtype))
        for path, spec in specs.items()
    }
    model.write_with(output, source, pending, cfg)
    return step


def _whole(x: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    yield x.astype(dtype)
