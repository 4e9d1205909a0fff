"""Ways of running a model side by side on the toy world, for several seeds of prompts and noise.

python experiments/compare.py --config=experiments/configs/compare.py:low_bits --output=runs/low

A config has rows, of which each is a model and how it is run; `{}` in a path stands for the seed.
Every row and seed is a file in --output; stopped, the same command goes on, and --seeds=1 or
--rows=NAME makes some of them while another process makes others. Means over seeds, and their
standard deviations.
"""

import dataclasses
import json
import pathlib
import sys
import time

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

import longlive_jax
from longlive_jax import cache_dir, output
from longlive_jax.errors import InputError
from longlive_jax.eval import fidelity
from longlive_jax.eval.fidelity import Sizes
from longlive_jax.eval.generate import generator

_CONFIG = config_flags.DEFINE_config_file("config", None, "Rows and sizes.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the rows.", required=True)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Of prompts and noise.")
_ROWS = flags.DEFINE_multi_string("rows", [], "Only the row of this name; may be repeated.")


@dataclasses.dataclass(frozen=True)
class Row:
    """name: also of its files. like: the name of an earlier row, whose videos its own are compared
    with. The rest is as of `longlive generate`.
    """

    name: str
    model: str = "tiny"
    lora: str = ""
    steps: int = 0
    precision: str = ""
    kv: str = ""
    eight_bit_scores: bool = False
    clean_pass: bool = True
    like: str = ""


def generate(row: Row, seed: int):
    """What makes its videos, eight at a time."""
    lora = row.lora.format(seed) or None
    model = longlive_jax.load(row.model.format(seed), lora=lora)
    model = model.quantized(row.precision) if row.precision else model
    model = model.streaming(clean_pass=row.clean_pass)
    memory = dict(kv=row.kv, eight_bit_scores=row.eight_bit_scores)
    model = model.streaming(**memory) if row.kv else model
    return generator(model, steps=row.steps or None, batch=8)


def evaluate(row: Row, sizes: Sizes, seed: int, folder: pathlib.Path) -> dict:
    """A row of one seed, read if it is there. Its short videos are put aside."""
    path, videos = (folder / f"{row.name}, seed {seed}{end}" for end in (".json", ".npy"))
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    began = time.perf_counter()
    made = fidelity.make(generate(row, seed), sizes, seed)
    seconds = time.perf_counter() - began
    np.save(videos, np.stack(made.short.videos))
    like = folder / f"{row.like}, seed {seed}.npy"
    found = fidelity.score(made, np.load(like) if row.like else ())
    facts = dataclasses.asdict(row) | dataclasses.asdict(sizes) | {"seconds_to_make": seconds}
    output.write_report(path, json.dumps({"scores": found, **facts}, indent=1) + "\n")
    logging.info("%s, seed %d: %s", row.name, seed, {k: round(x, 3) for k, x in found.items()})
    return json.loads(path.read_text("utf-8"))


def show(found: dict[Row, list[dict]]) -> None:
    names = list(dict.fromkeys(k for rows in found.values() for row in rows for k in row["scores"]))
    table = Table("", *names)
    for row, of_seeds in found.items():
        cells = []
        for name in names:
            x = [of["scores"][name] for of in of_seeds if name in of["scores"]]
            cells.append(f"{np.mean(x):.2f} ± {np.std(x, ddof=1):.2f}" if len(x) > 1 else str(*x))
        table.add_row(row.name, *cells)
    Console(width=200).print(table)


def _seeds(given: list[str]) -> list[int]:
    if not given or not all(seed.isdecimal() for seed in given):
        raise InputError(f"seeds are numbers with commas between them, not {','.join(given)!r}")
    return [int(seed) for seed in given]


def chosen(rows: list[Row], names: list[str]) -> list[Row]:
    """Return the rows of these names, with those that their videos are compared with; all of them
    where no name is given.

    Raises:
      InputError: there is no such row.
    """
    if not names:
        return rows
    known = {row.name: row for row in rows}
    for name in names:
        if name not in known:
            raise InputError(f"there is no row {name!r}: there are {', '.join(map(repr, known))}")
    needed = set(names) | {known[name].like for name in names}
    return [row for row in rows if row.name in needed]


def main(_):
    cache_dir.enable()
    folder, config = pathlib.Path(_OUTPUT.value), _CONFIG.value
    sizes = Sizes(**config.sizes)
    try:
        seeds = _seeds(_SEEDS.value)
        with output.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        rows = chosen([Row(name, **choices) for name, choices in config.rows], _ROWS.value)
        found = {row: [evaluate(row, sizes, seed, folder) for seed in seeds] for row in rows}
    except InputError as error:
        logging.error("%s", error)
        sys.exit(2)
    show(found)


if __name__ == "__main__":
    app.run(main)
