"""The toy world as a folder of real videos, in the layout of `data/folder.py`."""

from __future__ import annotations

import json
import pathlib

import numpy as np

from longlive_jax import output, weights
from longlive_jax.data import toy_world
from longlive_jax.events import CUT_PREFIX
from longlive_jax.video import VideoWriter

# A file has one caption, so that a prompt can only change where a new shot begins.
RECIPE = toy_world.Recipe(switch_rate=0.0, cut_rate=0.3)
CRF = 4  # what is left of the error is that of colours at half the resolution


def scripts(
    seed: int, count: int, chunks: int, recipe: toy_world.Recipe = RECIPE
) -> list[toy_world.Script]:
    """What the samples of a folder show, in order."""
    rng = np.random.default_rng(seed)
    return [toy_world.random_script(rng, chunks, recipe) for _ in range(count)]


def write(
    root: pathlib.Path, *, seed: int, samples: int, chunks: int, recipe: toy_world.Recipe = RECIPE
) -> list[toy_world.Script]:
    """Writes a new folder of samples of so many chunks each: whole, or not at all.

    Raises:
      InputError: it cannot be written, or is there already.
    """
    output.check_new_folder(root)
    made = scripts(seed, samples, chunks, recipe)
    with weights.new_folder(root) as stage:
        for number, script in enumerate(made):
            _write_sample(stage, f"{number:05}", script, chunks, recipe.latents)
    return made


def _write_sample(
    root: pathlib.Path, name: str, script: toy_world.Script, chunks: int, latents: int
) -> None:
    videos, captions = root / "video" / name, root / "caption" / name
    videos.mkdir(parents=True)
    captions.mkdir(parents=True)
    first = [segment.start for segment in script.segments]
    ends = [*first[1:], toy_world.chunk_start(chunks, latents)]
    for shot, (segment, end) in enumerate(zip(script.segments, ends, strict=True)):
        with VideoWriter(videos / f"{shot}.mp4", toy_world.FPS, CRF) as writer:
            writer.write(toy_world.render(script, end - segment.start, segment.start))
        said = json.dumps({"caption": segment.caption.removeprefix(CUT_PREFIX)})
        (captions / f"{shot}.json").write_text(said + "\n", "utf-8")
    begins = [chunk for chunk, _, _ in script.events(latents)]
    lengths = np.diff([*begins, chunks])
    (captions / "shot_durations.txt").write_text(", ".join(map(str, lengths)) + "\n", "utf-8")
