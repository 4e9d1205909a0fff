"""What fewer bits cost on the toy world, as Table 7 of the LongLive 2.0 paper: adherence, drift and
likeness to the same weights as they are, for several seeds.

python experiments/low_bits.py --output runs/low_bits --tuned 'runs/bf_{}_model' --trained
    'runs/nv_{}_model'

`{}` stands for the seed: models that `train_ar.py` tuned for as many steps without and with NVFP4
products. Every row is a file in --output; stopped, the same command goes on.
"""

import dataclasses
import json
import pathlib
import sys

import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

import longlive_jax
from longlive_jax import cache_dir, output
from longlive_jax.errors import InputError
from longlive_jax.eval import fidelity
from longlive_jax.eval.generate import generator

_OUTPUT = flags.DEFINE_string("output", None, "Folder for the rows.", required=True)
_TUNED = flags.DEFINE_string("tuned", None, "Models tuned as they are.", required=True)
_TRAINED = flags.DEFINE_string("trained", None, "Models tuned in NVFP4.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of prompts and noise.", 1)
_PROMPTS = flags.DEFINE_integer("prompts", 56, "Short videos of each seed.", 1)
_MINUTES = flags.DEFINE_integer("minutes", 16, "Videos of a minute of each seed.", 2)

SHOWN = ("adherence", "colour", "shape", "motion", "right_at_60s", "drift", "psnr")


@dataclasses.dataclass(frozen=True)
class Row:
    """A model ("tiny", or one of a seed), its products, and its memory; None is as they are."""

    model: str
    precision: str | None = None
    kv: str | None = None

    @property
    def name(self) -> str:
        return f"{self.model}, {self.precision or 'as it is'}, KV {self.kv or 'as it is'}"


# A model as it is comes first: the others are compared with it.
ROWS = (
    *(
        Row("tiny", how, kv)
        for how in (None, "nvfp4", "int8", "fp8")
        for kv in (None, "nvfp4", "int8")
    ),
    Row("tuned"),
    Row("tuned", "nvfp4"),
    Row("trained"),
    *(Row("trained", "nvfp4", kv) for kv in (None, "nvfp4", "int8")),
)


def evaluate(row: Row, seed: int, folder: pathlib.Path) -> dict:
    """A row of one seed, read if it is there. What models as they are show is put aside."""
    path = folder / f"{row.model}_{row.precision}_{row.kv}_{seed}.json"
    originals = folder / f"{row.model}_{seed}.npy"
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    names = {"tiny": "tiny", "tuned": _TUNED.value, "trained": _TRAINED.value}
    model = longlive_jax.load(names[row.model].format(seed))
    model = model.quantized(row.precision) if row.precision else model
    model = model.streaming(kv=row.kv) if row.kv else model
    sizes = dict(prompts=_PROMPTS.value, minutes=_MINUTES.value, seed=seed)
    made = fidelity.make(generator(model), **sizes)
    if row == Row(row.model):
        np.save(originals, np.stack(made.short))
    found = fidelity.score(made, np.load(originals)) | sizes
    output.write_report(path, json.dumps(found, indent=1) + "\n")
    logging.info("%s, seed %d: %s", row.name, seed, {k: round(found[k], 3) for k in SHOWN})
    return found


def main(_):
    cache_dir.enable()
    folder = pathlib.Path(_OUTPUT.value)
    try:
        with output.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        found = {row: [evaluate(row, seed, folder) for seed in range(_SEEDS.value)] for row in ROWS}
    except InputError as error:
        logging.error("%s", error)
        sys.exit(2)
    table = Table("model, products, KV", *SHOWN)
    for row, scores in found.items():
        columns = [[score[name] for score in scores] for name in SHOWN]
        table.add_row(row.name, *(f"{np.mean(x):.2f} ± {np.std(x):.2f}" for x in columns))
    Console(width=160).print(table)


if __name__ == "__main__":
    app.run(main)
