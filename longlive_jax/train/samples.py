"""Videos that a run makes of itself."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from longlive_jax import output
from longlive_jax.model import Model
from longlive_jax.video import VideoWriter


def write(model: Model, prompts: Sequence[str], seconds: float, folder: pathlib.Path) -> None:
    """A file for each prompt, "0.mp4" and so on. Raises InputError where none can be written."""
    with output.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(prompts):
        session = model.session(prompt, seed=number)
        with VideoWriter(folder / f"{number}.mp4", model.config.fps) as writer:
            for frames in session.stream(seconds, lookahead=1):
                writer.write(frames)
