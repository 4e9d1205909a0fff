"""Puts a trained VAE and transformer together as the model that ships with the package.

python experiments/export_tiny.py --vae runs/vae/vae.safetensors --dit runs/dit/ema.safetensors
"""

import pathlib
import sys

import jax.numpy as jnp
from absl import app, flags, logging

from longlive_jax import model, output, weights
from longlive_jax.config import TINY, folder_of
from longlive_jax.errors import InputError
from longlive_jax.text import tiny

_VAE = flags.DEFINE_string("vae", None, "Weights written by train_vae.", required=True)
_DIT = flags.DEFINE_string("dit", None, "Weights written by train_tiny_dit.", required=True)
_OUTPUT = flags.DEFINE_string("output", str(folder_of("tiny")), "Folder of the model.")


def main(_):
    folder = pathlib.Path(_OUTPUT.value)
    read = [("--vae", pathlib.Path(_VAE.value)), ("--dit", pathlib.Path(_DIT.value))]
    written = [("--output", folder / f"{part}.safetensors") for part in ("dit", "text", "vae")]
    try:
        output.check_apart(read, written)
        export(folder)
    except InputError as error:
        logging.error("%s", error)
        sys.exit(2)


def export(folder: pathlib.Path) -> None:
    trained = weights.load(_DIT.value)
    parts = {
        part: {
            k.removeprefix(f"{part}."): v for k, v in trained.items() if k.startswith(f"{part}.")
        }
        for part in ("dit", "text")
    }
    model.save(folder, TINY, parts | {"vae": weights.load(_VAE.value)}, jnp.bfloat16)
    tiny.write(folder / "tokenizer.json")


if __name__ == "__main__":
    app.run(main)
