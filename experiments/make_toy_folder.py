"""Writes videos of the toy world and their captions as a folder to train on.

python experiments/make_toy_folder.py --output runs/toy --samples 100 --chunks 16
longlive data check runs/toy --preset tiny

python experiments/make_toy_folder.py --output runs/clips --samples 3000 --chunks 4 --cuts 0
"""

import dataclasses
import pathlib

from absl import app, flags, logging

from longlive_jax.data import toy_folder

_OUTPUT = flags.DEFINE_string("output", None, "The new folder.", required=True)
_SAMPLES = flags.DEFINE_integer("samples", 100, "Long videos to write.", 1)
_CHUNKS = flags.DEFINE_integer("chunks", 16, "Chunks of each, of 12 frames.", 1)
_CUTS = flags.DEFINE_float("cuts", toy_folder.RECIPE.cut_rate, "Of chunks that begin a shot.", 0, 1)
_SEED = flags.DEFINE_integer("seed", 0, "The same seed, the same videos.", 0)


def main(_):
    made = toy_folder.write(
        pathlib.Path(_OUTPUT.value),
        seed=_SEED.value,
        samples=_SAMPLES.value,
        chunks=_CHUNKS.value,
        recipe=dataclasses.replace(toy_folder.RECIPE, cut_rate=_CUTS.value),
    )
    shots = sum(len(script.segments) for script in made)
    logging.info("wrote %d shots of %d samples to %s", shots, len(made), _OUTPUT.value)


if __name__ == "__main__":
    app.run(main)
