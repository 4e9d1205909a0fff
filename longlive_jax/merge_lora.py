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
from longlive_jax.lora_files import Choice, listed
from longlive_jax.output import check_new_folder

_PART = "dit"


def run(
    model: str | os.PathLike,
    lora: Choice,
    output: str | os.PathLike,
    *,
    alpha: float | int | None = None,
) -> tuple[str, ...]:
    """Writes the folder `output`, whole or not at all. Other weights are linked to the model's
    files where the disk allows it; the rest is copied. Returns what of the LoRAs is left out.

    Args:
      model: A folder.
      lora: A file; or several, each a path or a pair of a path and a strength.
      output: The new folder.
      alpha: Of all of them; None is what they say, or their ranks.

    Raises:
      InputError: the LoRA is of another model, a file is broken, or `output` is there already.
    """
    source, target = pathlib.Path(model), pathlib.Path(output)
    check_new_folder(target)
    tensors = weights.read(source, _PART)
    specs = {path: spec_of(tensors, path) for path in tensors}
    shapes = {path: spec.shape for path, spec in specs.items()}
    adapter = loras.read_all(listed(lora) or (), shapes, alpha=alpha) or loras.Lora({}, {})
    pending = {
        path: Pending(spec.shape, spec.dtype, functools.partial(_pieces, tensors, path, adapter))
        for path, spec in specs.items()
    }
    models.write_with(target, source, pending)
    return adapter.notes


def _pieces(tensors, path: str, lora: loras.Lora) -> Iterator[np.ndarray]:
    """The parameter, merged where the LoRA changes it; stacked ones block by block."""
    whole, linear = tensors[path], path.removesuffix(".kernel")
    adapted = linear != path and linear in lora.a
    if not adapted and path not in lora.changes:
        yield whole
        return
    blocks = range(len(whole)) if path.startswith("blocks.") else [None]
    for block in blocks:
        piece = slice(None) if block is None else slice(block, block + 1)
        change = np.float32(0)
        if path in lora.changes:
            change = np.asarray(lora.changes[path][piece])
        if adapted:
            parts = whole, lora.a[linear], lora.b[linear], lora.row_scales(linear)
            change = change + loras.LowRank(*(x[piece] for x in parts)).change()
        yield np.asarray(loras.added(whole[piece], change))
