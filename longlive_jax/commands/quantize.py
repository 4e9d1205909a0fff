"""`longlive quantize`: its flags."""

from __future__ import annotations

from absl import flags

from longlive_jax.commands.shared import Load
from longlive_jax.config import Precision
from longlive_jax.errors import InputError


def define(values: flags.FlagValues) -> None:
    """Flags of `longlive quantize`."""
    flags.DEFINE_string("model", "tiny", "tiny, or a folder with weights", flag_values=values)
    flags.DEFINE_enum(
        "precision", None, ["int8", "fp8", "nvfp4"], "of the blocks' matrices", flag_values=values
    )
    flags.DEFINE_multi_string(
        "layers",
        [],
        '"blocks.ffn_*=int8" chooses for the layers of that name; bf16 leaves them as they are',
        flag_values=values,
    )
    flags.DEFINE_bool("weights_only", False, "multiply what comes in as it is", flag_values=values)
    flags.DEFINE_integer(
        "tile", 1, "rows that share an NVFP4 scale: 1, or 16 as in training", flag_values=values
    )
    flags.DEFINE_string("output", None, "the folder to write", flag_values=values)


def run(values: flags.FlagValues, load: Load) -> None:
    """`longlive quantize`."""
    from longlive_jax import request

    request.check_model(values.model)
    if not values.output:
        raise InputError("say where to: --output FOLDER")
    pairs = [text.partition("=") for text in values.layers]
    layers = [(pattern.strip(), kind.strip()) for pattern, _, kind in pairs]
    layers += [("blocks.*", values.precision)] if values.precision else []
    if not layers:
        raise InputError("say in what: --precision int8, fp8 or nvfp4")
    try:
        how = Precision(tuple(layers), values.weights_only, values.tile)
    except ValueError as error:
        raise InputError(str(error)) from error

    from longlive_jax.quant import files  # imports JAX

    files.run(values.model, values.output, how)
