"""`longlive plan`: its flags."""

from __future__ import annotations

import dataclasses
from typing import Any

from absl import flags

from longlive_jax.commands.shared import Load, check_report, define_time
from longlive_jax.errors import InputError

GENERATION = ("precision", "kv", "guidance")  # flags that say nothing of training
TRAINING = ("latents", "accumulate")  # and of generation


def define(values: flags.FlagValues) -> None:
    """Flags of `longlive plan`."""
    flags.DEFINE_string(
        "preset", None, "tiny, wan21_1_3b, wan21_14b or wan22_5b", flag_values=values
    )
    define_time("seconds", 10.0, "length of the video", values)
    flags.DEFINE_string("gpu", "h100", "such as h100, b200, rtx4090", flag_values=values)
    flags.DEFINE_string(
        "mesh",
        "1x1",
        "videos side by side x devices for each; with --train, groups that share the weights x"
        " ranks of a sequence",
        flag_values=values,
    )
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
    flags.DEFINE_bool("train", False, "plan teacher forcing, not generation", flag_values=values)
    flags.DEFINE_integer(
        "latents", None, "of a training video, instead of --seconds", 1, flag_values=values
    )
    flags.DEFINE_integer(
        "accumulate", 1, "parts of a training step, one after the other", 1, flag_values=values
    )
    flags.DEFINE_string("json", None, "where to write the plan; - is stdout", flag_values=values)


def run(values: flags.FlagValues, load: Load) -> None:
    """`longlive plan`."""
    from longlive_jax import output, plan

    if values.preset is None:
        raise InputError(f"say which model: --preset {', '.join(plan.PRESETS)}")
    kind = "training" if values.train else "generation"
    _refuse(values, GENERATION if values.train else TRAINING, kind)
    planner, ask = _training(values) if values.train else _generation(values)
    target = check_report(values)
    made = planner.make(ask)
    planner.show(made, to_stderr=target == output.STDOUT)
    output.write_report(target, made.to_json())


def _generation(values: flags.FlagValues) -> tuple[Any, Any]:
    from longlive_jax import plan

    return plan, plan.Ask(**_asked(values, plan.Ask)).check()


def _training(values: flags.FlagValues) -> tuple[Any, Any]:
    from longlive_jax import plan

    # What both plans ask of their flags is checked first: the rest imports JAX.
    plan.Ask(values.preset, values.seconds, values.gpu, source=values.source).check()
    from longlive_jax.train import plan as training

    return training, training.Ask(**_asked(values, training.Ask)).check()


def _asked(values: flags.FlagValues, kind: type) -> dict[str, Any]:
    return {field.name: values[field.name].value for field in dataclasses.fields(kind)}


def _refuse(values: flags.FlagValues, names: tuple[str, ...], kind: str) -> None:
    """Raises InputError for a flag that would be without effect."""
    for name in names:
        if values[name].value != values[name].default:
            raise InputError(f"--{name} says nothing of {kind}")
