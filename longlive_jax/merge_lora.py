"""`longlive merge-lora`: a model's folder with a LoRA added into its transformer, as a new folder.

Block by block: the arithmetic is float32, what is written has the type of what was read, and no
more than a block of one kernel is held at a time.
"""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np

from longlive_jax import lora as loras
from longlive_jax import weights
from longlive_jax.convert.source import spec_of
from longlive_jax.convert.table import Pending
from longlive_jax.errors import InputError

_PART = "dit"
# The transformer's files; and the folder's own LoRA, whose place this one takes, as in `load`.
_REPLACED = ("dit.", "dit-", "lora.")


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
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is there already; name a new folder")
    adapter = loras.read(lora, alpha=alpha)
    tensors = weights.read(source, _PART)
    specs = {path: spec_of(tensors, path) for path in tensors}
    loras.check(adapter, {path: spec.shape for path, spec in specs.items()})
    pending = {
        path: Pending(spec.shape, spec.dtype, functools.partial(_pieces, tensors, path, adapter))
        for path, spec in specs.items()
    }
    with weights.new_folder(target) as folder:
        weights.write(folder, _PART, pending)
        take_others(source, folder)


def take_others(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Puts into `folder` what the model in `source` has beside its transformer. Weights are linked
    where the disk allows it; the rest, and what people edit, is copied.
    """
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(_REPLACED):
            _take(file, folder / file.name)


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


def _take(file: pathlib.Path, target: pathlib.Path) -> None:
    if file.suffix != ".safetensors":
        shutil.copyfile(file, target)
        return
    try:
        os.link(file.resolve(), target)
    except OSError:  # another disk, or one that knows no links
        shutil.copyfile(file, target)
