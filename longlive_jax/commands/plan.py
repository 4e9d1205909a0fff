"""`longlive plan`: its flags."""

from __future__ import annotations

import dataclasses

from absl import flags

from longlive_jax.commands.shared import Load, report_path
from longlive_jax.errors import InputError


def define(values: flags.FlagValues) -> None:
    """Flags of `longlive plan`."""
    flags.DEFINE_string(
        "preset", None, "tiny, wan21_1_3b, wan21_14b or wan22_5b", flag_values=values
    )
    flags.DEFINE_float("seconds", 10.0, "length of the video", flag_values=values)
    flags.DEFINE_string("gpu", "h100", "such as h100, b200, rtx4090", flag_values=values)
    flags.DEFINE_string("mesh", "1x1", "videos side by side x devices for each", flag_values=values)
    flags.DEFINE_string(
        "precision", "bf16", "of the transformer: bf16, int8, fp8, nvfp4", flag_values=values
    )
    flags.DEFINE_string("kv", "bf16", "of the cache: bf16, int8, fp8, nvfp4", flag_values=values)
    flags.DEFINE_float(
        "guidance", None, "1 is none; by default the preset's own", flag_values=values
    )
    flags.DEFINE_string(
        "source", "auto", "of activations: compiled, formula, auto", flag_values=values
    )
    flags.DEFINE_string("json", None, "where to write the plan; - is stdout", flag_values=values)


def run(values: flags.FlagValues, load: Load) -> None:
    """`longlive plan`."""
    from longlive_jax import output, plan

    if values.preset is None:
        raise InputError(f"say which model: --preset {', '.join(plan.PRESETS)}")
    asked = {field.name: values[field.name].value for field in dataclasses.fields(plan.Ask)}
    ask = plan.Ask(**asked).check()
    target = report_path(values)
    output.check_report(target)
    made = plan.make(ask)
    plan.show(made, to_stderr=target == output.STDOUT)
    output.write_report(target, made.to_json())
