"""What a run reports: a line, a file of JSON lines, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import pathlib
from typing import Any

import jax
from absl import logging

from longlive_jax import output


class Metrics:
    """Numbers by step, into `metrics.jsonl` and TensorBoard's files of a folder. Of several
    processes only the first one writes.

    step: what is there of later ones is taken back, as a run that was resumed comes to them again.

    Raises:
      InputError: the files cannot be written, at any time.
    """

    def __init__(self, folder: pathlib.Path, step: int = 0):
        self._path, self._file, self._board = folder / "metrics.jsonl", None, None
        if jax.process_index():
            return
        with output.writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            kept = _up_to(step, self._path)
            output.write_text(self._path, kept)
            self._file = self._path.open("a", encoding="utf-8")
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError:
            logging.info("no TensorBoard files: pip install 'longlive-jax[train]'")
        else:
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._file is None:
            return
        with output.writing(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        words = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        logging.info("step %d  %s", step, words)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written, `write` has said
                self._file.close()
        if self._board is not None:
            self._board.close()


def _up_to(step: int, path: pathlib.Path) -> str:
    """The lines up to a step; one that was cut short is none."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    whole = (line for line in lines if line.endswith("}\n"))
    return "".join(line for line in whole if json.loads(line)["step"] <= step)


def flops(counts: dict[str, Any]) -> float:
    """Arithmetic of a step: three times that of its forward (forward, and two products for each in
    the backward; what is computed again for want of memory does not count, as MFU has it).
    """
    linear = 2.0 * counts["tokens"] * counts["weights"]
    attention = 4.0 * counts["pairs"] * counts["width"] * counts["layers"]
    return 3.0 * (linear + attention)
