"""What a run reports: a line, a file of JSON lines, TensorBoard."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from absl import logging


class Metrics:
    """Numbers by step, into `metrics.jsonl` and TensorBoard's files of a folder."""

    def __init__(self, folder: pathlib.Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError:
            logging.info("no TensorBoard files: pip install 'longlive-jax[train]'")
            self._board = None
        else:
            self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        words = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        logging.info("step %d  %s", step, words)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def flops(counts: dict[str, Any]) -> float:
    """Arithmetic of a step: three times that of its forward (forward, and two products for each in
    the backward; what is computed again for want of memory does not count, as MFU has it).
    """
    linear = 2.0 * counts["tokens"] * counts["weights"]
    attention = 4.0 * counts["pairs"] * counts["width"] * counts["layers"]
    return 3.0 * (linear + attention)
