"""Flags that several commands have, and what is made of them.

Nothing in this package imports JAX before a command's input is known to be good.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

from absl import flags

from longlive_jax import backends, lora_files, output, times
from longlive_jax.config import folder_of
from longlive_jax.errors import InputError
from longlive_jax.lora_files import LoraFile

Load = Callable[..., Any]  # of a model's name, and the keywords of `longlive_jax.load`


class TimeParser(flags.FloatParser):
    """Reads a length or an instant: seconds, m:ss or h:mm:ss."""

    syntactic_help = f"a time: {times.FORMS}"

    def convert(self, argument: str | float | int) -> float:
        return times.read(argument) if isinstance(argument, str) else float(argument)


def define_time(
    name: str,
    default: float | None,
    what: str,
    values: flags.FlagValues,
    least: float | None = None,
) -> None:
    """Define a flag that takes a time.

    Args:
      name: The flag.
      default: In seconds.
      what: Its line of help.
      values: Where it is defined.
      least: The smallest value that is allowed, in seconds; None is any.
    """
    parser = TimeParser(lower_bound=least)
    flags.DEFINE(parser, name, default, what, values, flags.ArgumentSerializer())


def define_model(values: flags.FlagValues) -> None:
    """Flags of every command that runs a model."""
    flags.DEFINE_string("model", "tiny", "tiny, or a folder with weights", flag_values=values)
    define_lora(values, "a LoRA to apply to the model")
    flags.DEFINE_enum(
        "vae",
        "full",
        ["full", "light", "tae"],
        "what decodes: the model's own VAE, or a faster one that was converted beside it",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "seed", 0, "the same seed, the same video", 0, 2**32 - 1, flag_values=values
    )
    flags.DEFINE_integer(
        "steps",
        None,
        "denoising steps; by default the model's own number",
        1,
        1000,
        flag_values=values,
    )
    flags.DEFINE_string("json", None, "where to write the report; - is stdout", flag_values=values)
    flags.DEFINE_bool(
        "clean_pass",
        True,
        "read a finished chunk into memory by a forward of its own; otherwise its last step's keys"
        " and values stay: one forward less, in another memory than the model was trained with",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "attention",
        "best",
        ["best", *backends.names("attention/sink_window")],
        "what attends the memory; best: the first that can, of those that need not be asked for",
        flag_values=values,
    )
    define_precision(values)


def define_lora(values: flags.FlagValues, what: str) -> None:
    """Define the flag that names LoRAs."""
    words = f"{what}, FILE or FILE=STRENGTH; may be repeated, and all are added up"
    flags.DEFINE_multi_string("lora", [], words, flag_values=values)


def loras_of(values: flags.FlagValues) -> tuple[LoraFile, ...]:
    """Return the LoRAs that `--lora` names.

    Raises:
      InputError: a file is missing, or a strength is not finite.
    """
    return tuple(map(lora_files.parse, values.lora))


def define_precision(values: flags.FlagValues) -> None:
    """Flags of what is kept in fewer bits."""
    flags.DEFINE_enum(
        "precision",
        None,
        ["int8", "fp8", "nvfp4"],
        "quantise the matrices of the transformer's blocks, and what they are multiplied with",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "weights_only",
        False,
        "with --precision, or of a model in fewer bits: the matrices alone",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "kv",
        None,
        ["bf16", "int8", "fp8", "nvfp4"],
        "how keys and values in memory are kept; by default in the model's type",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "eight_bit_scores",
        False,
        "with --kv int8 or fp8: multiply keys as they are kept, with queries that are rounded so,"
        " too; without it they are unpacked",
        flag_values=values,
    )


def choosing(load: Load, values: flags.FlagValues) -> Load:
    """`load` with what `define_model`'s flags choose."""
    if loras := loras_of(values):
        load = functools.partial(load, lora=loras)
    if values.vae != "full":
        load = functools.partial(load, vae=values.vae)
    if values.weights_only and not values.precision:
        load = functools.partial(load, weights_only=True)
    changes = {} if values.clean_pass else {"clean_pass": False}
    changes |= {"attention": values.attention} if values.attention != "best" else {}
    changes |= {"kv": values.kv} if values.kv else {}
    changes |= {"eight_bit_scores": True} if values.eight_bit_scores else {}
    if not values.precision and not changes:
        return load
    return functools.partial(_changed, load, values, changes)


def _changed(
    load: Load, values: flags.FlagValues, changes: dict[str, Any], *arguments: Any, **keywords: Any
) -> Any:
    model = load(*arguments, **keywords)
    if values.precision:
        model = model.quantized(values.precision, weights_only=values.weights_only)
    return model.streaming(**changes) if changes else model


def check_file(flag: str, path: str | None) -> None:
    """Raises `InputError` where nothing is at `path`."""
    if not path:
        raise InputError(f"say which file: {flag} FILE")
    if not pathlib.Path(path).exists():
        raise InputError(f"{flag}: there is no {path}")


def check_report(
    values: flags.FlagValues, *inputs: tuple[str, pathlib.Path | None]
) -> pathlib.Path | None:
    """Return where `--json` points. It can be written, and is none of the files that are read.

    Args:
      values: The command's.
      inputs: Files and folders that it reads, each with its flag; `--model` and `--lora` are known.

    Raises:
      InputError: it cannot be used.
    """
    target = path_of(values.json)
    read = list(inputs)
    if "model" in values:
        read.append(("--model", folder_of(values.model)))
    if "lora" in values:
        read += [("--lora", pathlib.Path(file.path)) for file in loras_of(values)]
    output.check_apart(read, [("--json", target)])
    output.check_report(target)
    return target


def path_of(value: str | None) -> pathlib.Path | None:
    return None if value is None else pathlib.Path(value)


def report_path(values: flags.FlagValues) -> pathlib.Path | None:
    """Where `--json` points."""
    return path_of(values.json)
