"""`longlive merge-lora`: a model's folder with a LoRA added into its transformer, as a new folder.

Block by block: the arithmetic is float32, what is written has the type of what was read, and no
more than a block of one kernel is held at a time.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from longlive_jax import lora as loras
from longlive_jax import model as models
from longlive_jax import weights
from longlive_jax.convert.source import spec_of
from longlive_jax.convert.table import Pending
from longlive_jax.output import check_new_folder

_PART = "dit"


def run(
    model: str | os.PathLike,
    lora: str | os.PathLike,
    output: str | os.PathLike,
    *,
    alpha: float | int | None = None,
) -> None:
    """Writes the folder `output`, whole or not at all. Other weights are linked to the model's
    files where the disk allows it; the rest is copied.

    Raises:
      InputError: the LoRA is of another model, a file is broken, or `output` is there already.
    """
    source, target = pathlib.Path(model), pathlib.Path(output)
    check_new_folder(target)
    adapter = loras.read(lora, alpha=alpha)
    tensors = weights.read(source, _PART)
    specs = {path: spec_of(tensors, path) for path in tensors}
    loras.check(adapter, {path: spec.shape for path, spec in specs.items()})
    pending = {
        path: Pending(spec.shape, spec.dtype, functools.partial(_pieces, tensors, path, adapter))
        for path, spec in specs.items()
    }
    models.write_with(target, source, pending)


def _pieces(tensors, path: str, lora: loras.Lora) -> Iterator[np.ndarray]:
    """The parameter, merged where the LoRA adapts it; stacked ones block by block."""
    whole, linear = tensors[path], path.removesuffix(".kernel")
    if linear == path or linear not in lora.a:
        yield whole
    elif whole.ndim == 2:
        parts = whole, lora.a[linear], lora.b[linear]
        yield np.asarray(loras.LowRank(*parts, lora.scale(linear)).dense())
    else:
        for i in range(len(whole)):
            parts = (x[i : i + 1] for x in (whole, lora.a[linear], lora.b[linear]))
            yield np.asarray(loras.LowRank(*parts, lora.scale(linear)).dense())
