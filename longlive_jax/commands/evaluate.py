"""`longlive eval`: its flags."""

from __future__ import annotations

import functools
import json

from absl import flags

from longlive_jax.commands.shared import Load, check_report, choosing, define_model, define_time


def define(values: flags.FlagValues) -> None:
    """Flags of `longlive eval`."""
    suites = ["toy", "switch", "drift"]
    flags.DEFINE_enum("suite", "toy", suites, "what to measure", flag_values=values)
    define_time("seconds", 60.0, "length of the videos of --suite drift", values, least=10.0)
    define_model(values)


def run(values: flags.FlagValues, load: Load) -> None:
    """`longlive eval`: the scores go to standard output unless `--json` names a file."""
    from longlive_jax import output, request

    request.check_model(values.model)
    target = check_report(values) or output.STDOUT

    from longlive_jax.eval import run  # imports JAX

    long = functools.partial(run.drift, seconds=values.seconds)
    suite = {"toy": run.toy, "switch": run.switch, "drift": long}[values.suite]
    scores = suite(choosing(load, values)(values.model), steps=values.steps, seed=values.seed)
    output.write_report(target, json.dumps(scores, indent=2) + "\n")
