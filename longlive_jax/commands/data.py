"""`longlive data`: its flags."""

from __future__ import annotations

import pathlib

from absl import flags

from longlive_jax.commands.shared import Load, check_report
from longlive_jax.errors import InputError


def define(values: flags.FlagValues) -> None:
    """Flags of `longlive data check DIR`."""
    flags.DEFINE_enum("task", None, ["check"], "what to do", flag_values=values)
    flags.DEFINE_string("dir", None, "a folder of training videos", flag_values=values)
    flags.DEFINE_string(
        "preset",
        "wan22_5b",
        "the model to train: tiny, wan21_1_3b, wan21_14b or wan22_5b",
        flag_values=values,
    )
    flags.DEFINE_string("json", None, "where to write the report; - is stdout", flag_values=values)


def run(values: flags.FlagValues, load: Load) -> None:
    """`longlive data check DIR`: code 2 where samples cannot be used."""
    del load
    if not values.task or not values.dir:
        raise InputError("say which folder: longlive data check DIR")

    target = check_report(values, ("DIR", pathlib.Path(values.dir)))

    from longlive_jax.data import check

    check.run(pathlib.Path(values.dir), target, values.preset)
