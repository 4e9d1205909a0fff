"""`longlive bench`: its flags."""

from __future__ import annotations

from absl import flags

from longlive_jax.commands.shared import Load, choosing, define_model, report_path


def define(values: flags.FlagValues) -> None:
    """Flags of `longlive bench`."""
    suites = ["generate", "session"]
    length = "of each measured video; by default 10, with --suite session 240"
    flags.DEFINE_enum("suite", suites[0], suites, "what to measure", flag_values=values)
    flags.DEFINE_float("seconds", None, f"length {length}", flag_values=values)
    flags.DEFINE_integer("repeat", 3, "how many videos to measure", 1, flag_values=values)
    define_model(values)


def run(values: flags.FlagValues, load: Load) -> None:
    """`longlive bench`."""
    from longlive_jax import output, request

    defaults = {"generate": 10.0, "session": 240.0}
    seconds = defaults[values.suite] if values.seconds is None else values.seconds
    request.check_seconds(seconds)
    request.check_model(values.model)
    target = report_path(values)
    output.check_report(target)

    from longlive_jax import bench, bench_session  # imports JAX

    suite = {"generate": bench, "session": bench_session}[values.suite]
    report = suite.run(
        choosing(load, values)(values.model),
        seconds=seconds,
        repeat=values.repeat,
        seed=values.seed,
        steps=values.steps,
    )
    suite.show(report, to_stderr=target == output.STDOUT)
    output.write_report(target, report.to_json())
