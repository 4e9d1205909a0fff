"""`longlive bench`: its flags."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from absl import flags

from longlive_jax.commands.shared import Load, check_report, choosing, define_model, define_time
from longlive_jax.errors import InputError

SIZES = ("preset", "random_weights")
WEIGHTS = ("model", *SIZES)
CHOICES = (
    *("lora", "vae", "precision", "weights_only"),
    *("kv", "eight_bit_scores", "attention", "clean_pass"),
)


@dataclasses.dataclass(frozen=True)
class Suite:
    """module: whose `run` measures. seconds: of each video, unless told otherwise; None where
    videos have no length. options: flags that `run` takes. others: flags that have a meaning.
    """

    module: str
    seconds: float | None
    options: tuple[str, ...]
    others: tuple[str, ...]


SUITES = {
    "generate": Suite(
        "bench", 10.0, ("repeat", "seed", "steps", "change"), ("seconds", *WEIGHTS, *CHOICES)
    ),
    "session": Suite(
        "bench_session", 240.0, ("repeat", "seed", "steps"), ("seconds", *WEIGHTS, *CHOICES)
    ),
    "vae": Suite("bench_vae", None, ("repeat", "seed"), WEIGHTS),
    "train": Suite(
        "bench_train", 12.0, ("repeat", "seed"), ("seconds", "cpu_devices", "lora", *WEIGHTS)
    ),
    "kernels": Suite("bench_kernels", None, ("op", "shapes", "repeat", "seed"), ()),
}
EVERYWHERE = ("suite", "json")


def define(values: flags.FlagValues) -> None:
    """Flags of `longlive bench`."""
    from longlive_jax.plan import PRESETS

    lengths = ", ".join(f"{name} {x.seconds:g}" for name, x in SUITES.items() if x.seconds)
    enum = flags.DEFINE_enum
    enum("suite", "generate", list(SUITES), "what to measure", flag_values=values)
    define_time("seconds", None, f"length of each measured video; by default {lengths}", values)
    flags.DEFINE_integer("repeat", 3, "how often it is measured", 1, flag_values=values)
    flags.DEFINE_integer(
        "cpu_devices",
        0,
        "virtual CPU devices for --suite train, where there is no accelerator",
        0,
        flag_values=values,
    )
    changes = ["switch", "cut", "none"]
    enum("change", "switch", changes, "half-way, with --suite generate", flag_values=values)
    enum("preset", None, list(PRESETS), "a size, with --random_weights", flag_values=values)
    flags.DEFINE_bool(
        "random_weights",
        False,
        "measure a model of the size --preset; nothing is loaded, nothing can be seen in its"
        " videos, and prompts are random embeddings",
        flag_values=values,
    )
    flags.DEFINE_string(
        "op", None, "which kernels, with --suite kernels; by default all", flag_values=values
    )
    enum(
        "shapes",
        None,
        ["all", "small"],
        "with --suite kernels: all shapes, or those that take no longer than a moment; by default"
        " all on an accelerator, small on a CPU",
        flag_values=values,
    )
    define_model(values)


def run(values: flags.FlagValues, load: Load) -> None:
    """`longlive bench`."""
    from longlive_jax import output, request

    suite = SUITES[values.suite]
    _refuse(values, suite)
    options = {name: values[name].value for name in suite.options}
    if suite.seconds is not None:
        options["seconds"] = suite.seconds if values.seconds is None else values.seconds
        request.check_seconds(options["seconds"])
    if "model" in suite.others:
        request.check_model(values.model)
    target = check_report(values)

    from longlive_jax import cache_dir, cpu_devices

    cache_dir.enable()
    if values.cpu_devices:
        cpu_devices.request(values.cpu_devices)

    from longlive_jax import report

    given = [_model(values, load)] if "model" in suite.others else []
    summary = importlib.import_module(f"longlive_jax.{suite.module}").run(*given, **options)
    report.show(summary, to_stderr=target == output.STDOUT)
    output.write_report(target, summary.to_json())


def _refuse(values: flags.FlagValues, suite: Suite) -> None:
    """Raises InputError for flags that would be without effect, or lack another."""
    known = (*EVERYWHERE, *suite.options, *suite.others)
    for name in values:
        flag = values[name]
        if flag.name not in known and flag.value != flag.default:
            raise InputError(f"--{flag.name} says nothing of --suite {values.suite}")
    if values.preset and not values.random_weights:
        raise InputError(
            "--preset is a size without weights: add --random_weights, or name weights by --model"
        )
    if values.random_weights:
        if not values.preset:
            raise InputError("--random_weights needs a size: say --preset")
        if values.model != values["model"].default or values.lora:
            raise InputError("--random_weights loads no weights: leave --model and --lora out")


def _model(values: flags.FlagValues, load: Load) -> Any:
    if not values.random_weights:
        return choosing(load, values)(values.model)

    import functools

    from longlive_jax import bench_model, plan

    seconds = SUITES[values.suite].seconds if values.seconds is None else values.seconds
    bits = dict(precision=values.precision or "bf16", kv=values.kv or "bf16")
    ask = plan.Ask(values.preset, seconds or 1.0, **bits).check()
    # A session tries every way of switching.
    switches = values.suite == "session" or values.change == "switch"
    bench_model.check_memory(ask, values.suite, switches=switches)
    transformer = values.suite != "vae"
    drawn = functools.partial(bench_model.load, seed=values.seed, transformer=transformer)
    return choosing(drawn, values)(values.preset)
