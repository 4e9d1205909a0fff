"""Puts a trained VAE and transformer together as the model that ships with the package.

python experiments/export_tiny.py --vae runs/vae/vae.safetensors --dit runs/dit/ema.safetensors
"""

import pathlib

import jax.numpy as jnp
from absl import app, flags

from longlive_jax import model, weights
from longlive_jax.config import TINY, folder_of
from longlive_jax.text import tiny

_VAE = flags.DEFINE_string("vae", None, "Weights written by train_vae.", required=True)
_DIT = flags.DEFINE_string("dit", None, "Weights written by train_tiny_dit.", required=True)
_OUTPUT = flags.DEFINE_string("output", str(folder_of("tiny")), "Folder of the model.")


def main(_):
    trained = weights.load(_DIT.value)
    parts = {
        part: {
            k.removeprefix(f"{part}."): v for k, v in trained.items() if k.startswith(f"{part}.")
        }
        for part in ("dit", "text")
    }
    output = pathlib.Path(_OUTPUT.value)
    model.save(output, TINY, parts | {"vae": weights.load(_VAE.value)}, jnp.bfloat16)
    tiny.write(output / "tokenizer.json")


if __name__ == "__main__":
    app.run(main)
