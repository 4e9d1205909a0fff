"""Writes prompts of the toy world, a line for each video: its opening, and what changes.

python experiments/make_toy_prompts.py --output runs/prompts.jsonl --count 4000 --changes 1
"""

import json
import pathlib

import numpy as np
from absl import app, flags

from longlive_jax import output
from longlive_jax.data.caption import ATTRIBUTES, BACKGROUNDS, MOTIONS, Scene, Thing, caption
from longlive_jax.data.toy_world import SEEN_PAIRS, draw_switch

_OUTPUT = flags.DEFINE_string("output", None, "The new file.", required=True)
_COUNT = flags.DEFINE_integer("count", 4000, "Lines.", 1)
_CHANGES = flags.DEFINE_integer("changes", 1, "Further prompts of a line, one change each.", 0)
_SEED = flags.DEFINE_integer("seed", 0, "The same seed, the same prompts.", 0)


def line(rng: np.random.Generator) -> list[str]:
    """A scene, and the same after each change of one attribute; every other caption varied."""
    pair = SEEN_PAIRS[rng.integers(len(SEEN_PAIRS))]
    thing = Thing(*pair, MOTIONS[rng.integers(len(MOTIONS))])
    scenes = [Scene((thing,), BACKGROUNDS[rng.integers(len(BACKGROUNDS))])]
    for _ in range(_CHANGES.value):
        attribute = ATTRIBUTES[rng.integers(len(ATTRIBUTES))]
        scenes.append(draw_switch(rng, scenes[-1], attribute))
    varied = rng if rng.random() < 0.5 else None
    return [caption(scene, varied) for scene in scenes]


def main(_):
    rng = np.random.default_rng(_SEED.value)
    lines = [json.dumps(line(rng)) for _ in range(_COUNT.value)]
    path = pathlib.Path(_OUTPUT.value)
    with output.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(path, "\n".join(lines) + "\n")


if __name__ == "__main__":
    app.run(main)
