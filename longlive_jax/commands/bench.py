"""`longlive bench`: its flags."""

from __future__ import annotations

from absl import flags

from longlive_jax.commands.shared import Load, choosing, define_model, report_path


def define(values: flags.FlagValues) -> None:
    """Flags of `longlive bench`."""
    suites = ["generate", "session", "train"]
    length = "of each measured video; by default 10, with --suite session 240, with train 12"
    flags.DEFINE_enum("suite", suites[0], suites, "what to measure", flag_values=values)
    flags.DEFINE_float("seconds", None, f"length {length}", flag_values=values)
    flags.DEFINE_integer("repeat", 3, "how many videos to measure", 1, flag_values=values)
    flags.DEFINE_integer(
        "cpu_devices",
        0,
        "virtual CPU devices for --suite train, where there is no accelerator",
        0,
        flag_values=values,
    )
    define_model(values)


def run(values: flags.FlagValues, load: Load) -> None:
    """`longlive bench`."""
    from longlive_jax import output, request

    defaults = {"generate": 10.0, "session": 240.0, "train": 12.0}
    seconds = defaults[values.suite] if values.seconds is None else values.seconds
    request.check_seconds(seconds)
    request.check_model(values.model)
    target = report_path(values)
    output.check_report(target)

    import jax

    if values.cpu_devices:
        jax.config.update("jax_num_cpu_devices", values.cpu_devices)

    from longlive_jax import bench, bench_session, bench_train, report

    suite = {"generate": bench, "session": bench_session, "train": bench_train}[values.suite]
    summary = suite.run(
        choosing(load, values)(values.model),
        seconds=seconds,
        repeat=values.repeat,
        seed=values.seed,
        steps=values.steps,
    )
    report.show(summary, to_stderr=target == output.STDOUT)
    output.write_report(target, summary.to_json())
