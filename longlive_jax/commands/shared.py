"""Flags that several commands have, and what is made of them.

Nothing in this package imports JAX before a command's input is known to be good.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

from absl import flags

from longlive_jax.errors import InputError

Load = Callable[..., Any]  # of a model's name, and the keywords of `longlive_jax.load`


def define_model(values: flags.FlagValues) -> None:
    """Flags of every command that runs a model."""
    flags.DEFINE_string("model", "tiny", "tiny, or a folder with weights", flag_values=values)
    flags.DEFINE_string("lora", None, "a LoRA to apply to the model", flag_values=values)
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


def choosing(load: Load, values: flags.FlagValues) -> Load:
    """`load` with what `define_model`'s flags choose."""
    if values.lora is not None:
        check_file("--lora", values.lora)
        load = functools.partial(load, lora=pathlib.Path(values.lora))
    return load if values.vae == "full" else functools.partial(load, vae=values.vae)


def check_file(flag: str, path: str | None) -> None:
    """Raises `InputError` where nothing is at `path`."""
    if not path:
        raise InputError(f"say which file: {flag} FILE")
    if not pathlib.Path(path).exists():
        raise InputError(f"{flag}: there is no {path}")


def path_of(value: str | None) -> pathlib.Path | None:
    return None if value is None else pathlib.Path(value)


def report_path(values: flags.FlagValues) -> pathlib.Path | None:
    """Where `--json` points."""
    return path_of(values.json)
