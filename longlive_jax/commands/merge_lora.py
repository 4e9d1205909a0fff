"""`longlive merge-lora`: its flags."""

from __future__ import annotations

import sys

from absl import flags

from longlive_jax.commands.shared import Load, define_lora, loras_of
from longlive_jax.errors import InputError


def define(values: flags.FlagValues) -> None:
    """Flags of `longlive merge-lora`."""
    flags.DEFINE_string("model", "tiny", "tiny, or a folder with weights", flag_values=values)
    define_lora(values, "the LoRA to merge")
    flags.DEFINE_string("output", None, "the folder to write", flag_values=values)
    flags.DEFINE_float(
        "alpha", None, "by default what the LoRA says, or its rank", 0.0, flag_values=values
    )


def run(values: flags.FlagValues, load: Load) -> None:
    """`longlive merge-lora`."""
    from longlive_jax import request

    request.check_model(values.model)
    files = loras_of(values)
    if not files:
        raise InputError("say which file: --lora FILE")
    if not values.output:
        raise InputError("say where to: --output FOLDER")

    from longlive_jax import merge_lora, model  # imports JAX

    notes = merge_lora.run(model.folder_of(values.model), files, values.output, alpha=values.alpha)
    for note in notes:
        sys.stderr.write(f"longlive: {note}\n")
