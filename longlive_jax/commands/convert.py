"""`longlive convert`: its flags."""

from __future__ import annotations

import pathlib
import sys

from absl import flags

from longlive_jax.commands.shared import Load, check_file
from longlive_jax.errors import InputError


def define(values: flags.FlagValues) -> None:
    """Flags of `longlive convert`."""
    flags.DEFINE_multi_string(
        "from",
        [],
        "a folder or a file with weights; several make one model, the last of a part counts",
        flag_values=values,
    )
    flags.DEFINE_string("to", None, "the new folder to write", flag_values=values)
    flags.DEFINE_enum(
        "to-format",
        "longlive",
        ["longlive", "pytorch", "diffusers"],
        "whose files to write",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "dtype", "keep", ["keep", "bfloat16", "float32"], "type of the weights", flag_values=values
    )
    flags.DEFINE_boolean("ema", False, "take generator_ema", flag_values=values)
    flags.DEFINE_boolean(
        "allow-missing",
        False,
        "set parameters that the checkpoint lacks to zero, and say so in the config",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "dequantize", False, "make bfloat16 of matrices in fewer bits", flag_values=values
    )
    flags.DEFINE_integer(
        "steps",
        None,
        "steps that the transformer was distilled to; by default its family's number",
        1,
        1000,
        flag_values=values,
    )


def run(values: flags.FlagValues, load: Load) -> None:
    """`longlive convert`."""
    del load
    paths = [pathlib.Path(path) for path in values["from"].value]
    if not paths or not values.to:
        raise InputError("say what to convert and where to: --from PATH --to FOLDER")
    for path in paths:
        check_file("--from", str(path))

    from longlive_jax.convert import run  # imports JAX

    notes = run.convert(
        paths,
        pathlib.Path(values.to),
        layout=values["to-format"].value,
        allow_missing=values["allow-missing"].value,
        dtype=values.dtype,
        ema=values.ema,
        steps=values.steps,
        dequantize=values.dequantize,
    )
    for note in notes:
        sys.stderr.write(f"longlive: {note}\n")
