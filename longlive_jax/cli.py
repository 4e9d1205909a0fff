"""The command `longlive`: reads flags, runs one subcommand, turns errors into sentences.

Exit codes: 0 done, 2 bad input (one sentence on stderr), 130 stopped by Ctrl-C.
Nothing here imports JAX until the flags have been read, so that bad input is answered at once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from longlive_jax import cache_dir
from longlive_jax.config import Recache
from longlive_jax.errors import InputError
from longlive_jax.version import __version__

Load = Callable[..., Any]  # of a model's name, and the keywords of `longlive_jax.load`
HELP = ("-h", "--help", "help")


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: what it does, its flags, and the function that they are handed to.

    words: flags whose values may stand right after the name, without the flag.
    """

    what: str
    define: Callable[[flags.FlagValues], None]
    run: Callable[[flags.FlagValues, Load], None]
    words: tuple[str, ...] = ()


def load_model(name: str, **choices: Any) -> Any:
    """`longlive_jax.load`, with every program that it compiles kept on disk."""
    cache_dir.enable()
    import longlive_jax

    return longlive_jax.load(name, **choices)


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


def define_generate(values: flags.FlagValues) -> None:
    """Flags of `longlive generate`."""
    flags.DEFINE_string("prompt", "", "what to show", flag_values=values)
    flags.DEFINE_float("seconds", None, "length of the video; by default 10", flag_values=values)
    flags.DEFINE_string("output", "out.mp4", "the video file to write", flag_values=values)
    flags.DEFINE_multi_string(
        "at", [], '"5: a new prompt" changes the prompt at 5 s', flag_values=values
    )
    flags.DEFINE_multi_string(
        "cut", [], '"8: a new scene" cuts to a new shot at 8 s', flag_values=values
    )
    flags.DEFINE_enum(
        "recache",
        None,
        [*Recache.FORMS, "keep", "reset"],
        "what --at does to the memory: re-read it, in one of two forms, keep it, or empty it",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "sinks",
        None,
        list(Recache.SINKS),
        "the sinks of a re-read memory: the video's first frames read anew, those kept as they"
        " are, or the window's first frames",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "rope",
        None,
        ["absolute", "relative"],
        "positions of frames: in the video, or among those in memory",
        flag_values=values,
    )
    flags.DEFINE_string("image", None, "a picture that the video begins with", flag_values=values)
    flags.DEFINE_string("video", None, "a clip that the video continues", flag_values=values)
    flags.DEFINE_string(
        "script",
        None,
        "a story.json, or LongLive's prompt files: .txt, .jsonl, a folder of captions",
        flag_values=values,
    )
    flags.DEFINE_string("resume", None, "a saved session to continue", flag_values=values)
    flags.DEFINE_string("save-session", None, "where to save the session", flag_values=values)
    define_model(values)


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


def define_bench(values: flags.FlagValues) -> None:
    """Flags of `longlive bench`."""
    suites = ["generate", "session"]
    length = "of each measured video; by default 10, with --suite session 240"
    flags.DEFINE_enum("suite", suites[0], suites, "what to measure", flag_values=values)
    flags.DEFINE_float("seconds", None, f"length {length}", flag_values=values)
    flags.DEFINE_integer("repeat", 3, "how many videos to measure", 1, flag_values=values)
    define_model(values)


def define_eval(values: flags.FlagValues) -> None:
    """Flags of `longlive eval`."""
    flags.DEFINE_enum("suite", "toy", ["toy", "switch"], "what to measure", flag_values=values)
    define_model(values)


def define_merge_lora(values: flags.FlagValues) -> None:
    """Flags of `longlive merge-lora`."""
    flags.DEFINE_string("model", "tiny", "tiny, or a folder with weights", flag_values=values)
    flags.DEFINE_string("lora", None, "the LoRA to merge", flag_values=values)
    flags.DEFINE_string("output", None, "the folder to write", flag_values=values)
    flags.DEFINE_float(
        "alpha", None, "by default what the LoRA says, or its rank", 0.0, flag_values=values
    )


def define_plan(values: flags.FlagValues) -> None:
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


def define_doctor(values: flags.FlagValues) -> None:
    """Flags of `longlive doctor`."""
    flags.DEFINE_boolean("json", False, "as JSON instead of tables", flag_values=values)


def run_generate(values: flags.FlagValues, load: Load) -> None:
    """`longlive generate`."""
    from longlive_jax import events
    from longlive_jax.request import Request

    changes = [events.parse("switch", text) for text in values.at]
    changes += [events.parse("cut", text) for text in values.cut]
    request = Request(
        prompt=values.prompt,
        seconds=values.seconds,
        output=pathlib.Path(values.output),
        events=tuple(changes),
        seed=values["seed"].value if values["seed"].present else None,
        steps=values.steps,
        model=values.model,
        json=report_path(values),
        image=path_of(values.image),
        video=path_of(values.video),
        script=path_of(values.script),
        mode=values.recache if values.recache in events.MODES else None,
        stream=stream_choices(values),
        resume=path_of(values.resume),
        save=path_of(values["save-session"].value),
    )
    drafts = request.check()

    from longlive_jax import generate  # imports JAX

    generate.run(request, drafts, choosing(load, values))


def stream_choices(values: flags.FlagValues) -> tuple[tuple[str, Any], ...]:
    """What the flags put in the place of values of the model's `StreamConfig`."""
    rereads = values.recache is None or values.recache in Recache.FORMS
    if values.sinks and not rereads:
        raise InputError(f"--sinks is about a memory that is re-read: not with {values.recache}")
    how = {"form": values.recache, "sinks": values.sinks} if rereads else {}
    how = {name: value for name, value in how.items() if value}
    chosen = {"rope": values.rope, "recache": Recache(**how) if how else None}
    return tuple((name, value) for name, value in chosen.items() if value)


def path_of(value: str | None) -> pathlib.Path | None:
    return None if value is None else pathlib.Path(value)


def run_bench(values: flags.FlagValues, load: Load) -> None:
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


def run_eval(values: flags.FlagValues, load: Load) -> None:
    """`longlive eval`: the scores go to standard output unless `--json` names a file."""
    from longlive_jax import output, request

    request.check_model(values.model)
    target = report_path(values) or output.STDOUT
    output.check_report(target)

    from longlive_jax.eval import run  # imports JAX

    suite = {"toy": run.toy, "switch": run.switch}[values.suite]
    scores = suite(choosing(load, values)(values.model), steps=values.steps, seed=values.seed)
    output.write_report(target, json.dumps(scores, indent=2) + "\n")


def run_merge_lora(values: flags.FlagValues, load: Load) -> None:
    """`longlive merge-lora`."""
    from longlive_jax import request

    request.check_model(values.model)
    check_file("--lora", values.lora)
    if not values.output:
        raise InputError("say where to: --output FOLDER")

    from longlive_jax import merge_lora, model  # imports JAX

    source = model.SHIPPED / "tiny" if values.model == "tiny" else values.model
    merge_lora.run(source, values.lora, values.output, alpha=values.alpha)


def run_plan(values: flags.FlagValues, load: Load) -> None:
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


def run_doctor(values: flags.FlagValues, load: Load) -> None:
    """`longlive doctor`: code 2 where nothing can be generated."""
    from longlive_jax import doctor

    doctor.run(as_json=values.json)


def define_convert(values: flags.FlagValues) -> None:
    """Flags of `longlive convert`."""
    flags.DEFINE_multi_string(
        "from",
        [],
        "a folder or a file with weights; several make one model, the last of a part counts",
        flag_values=values,
    )
    flags.DEFINE_string("to", None, "the new folder to write", flag_values=values)
    flags.DEFINE_enum(
        "to-format",
        "longlive",
        ["longlive", "pytorch", "diffusers"],
        "whose files to write",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "dtype", "keep", ["keep", "bfloat16", "float32"], "type of the weights", flag_values=values
    )
    flags.DEFINE_boolean("ema", False, "take generator_ema", flag_values=values)
    flags.DEFINE_boolean(
        "allow-missing",
        False,
        "set parameters that the checkpoint lacks to zero, and say so in the config",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "steps",
        None,
        "steps that the transformer was distilled to; by default its family's number",
        1,
        1000,
        flag_values=values,
    )


def run_convert(values: flags.FlagValues, load: Load) -> None:
    """`longlive convert`."""
    del load
    paths = [pathlib.Path(path) for path in values["from"].value]
    if not paths or not values.to:
        raise InputError("say what to convert and where to: --from PATH --to FOLDER")
    for path in paths:
        check_file("--from", str(path))

    from longlive_jax.convert import run  # imports JAX

    notes = run.convert(
        paths,
        pathlib.Path(values.to),
        layout=values["to-format"].value,
        allow_missing=values["allow-missing"].value,
        dtype=values.dtype,
        ema=values.ema,
        steps=values.steps,
    )
    for note in notes:
        sys.stderr.write(f"longlive: {note}\n")


def define_data(values: flags.FlagValues) -> None:
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


def run_data(values: flags.FlagValues, load: Load) -> None:
    """`longlive data check DIR`: code 2 where samples cannot be used."""
    del load
    if not values.task or not values.dir:
        raise InputError("say which folder: longlive data check DIR")

    from longlive_jax.data import check

    check.run(pathlib.Path(values.dir), report_path(values), values.preset)


def report_path(values: flags.FlagValues) -> pathlib.Path | None:
    """Where `--json` points."""
    return path_of(values.json)


COMMANDS = {
    "generate": Command("make a video from prompts", define_generate, run_generate),
    "bench": Command("measure speed and memory", define_bench, run_bench),
    "eval": Command("measure how well videos follow their prompts", define_eval, run_eval),
    "convert": Command(
        "read published weights, or write them out again", define_convert, run_convert
    ),
    "merge-lora": Command("add a LoRA into a model's weights", define_merge_lora, run_merge_lora),
    "plan": Command("say whether a video fits in a GPU's memory", define_plan, run_plan),
    "data": Command(
        "say what is wrong in a folder of training videos",
        define_data,
        run_data,
        words=("task", "dir"),
    ),
    "doctor": Command("say what runs here, and mend what does not", define_doctor, run_doctor),
}


def usage() -> str:
    """What `longlive --help` says."""
    lines = [f"  {name:<12}{command.what}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: longlive COMMAND [flags]",
            "",
            *lines,
            "",
            "longlive COMMAND --help lists its flags.",
        ]
    )


def flag_help(name: str, values: flags.FlagValues) -> str:
    """What `longlive COMMAND --help` says."""
    lines = [f"usage: longlive {name} [flags]", "", COMMANDS[name].what.capitalize() + ".", ""]
    for flag in values.flags_by_module_dict()[__name__]:
        default = "" if flag.default in (None, "", []) else f" [{flag.default}]"
        lines.append(f"  --{flag.name:<10}{' '.join(flag.help.split())}{default}")
    return "\n".join(lines)


def dispatch(arguments: Sequence[str], load: Load) -> None:
    """Runs what the arguments say.

    Raises:
      InputError: they say nothing that can be done.
    """
    if not arguments or arguments[0] in HELP:
        sys.stdout.write(usage() + "\n")
        return
    if arguments[0] == "--version":
        sys.stdout.write(f"longlive-jax {__version__}\n")
        return
    name, *rest = arguments
    if name not in COMMANDS:
        raise InputError(f'there is no command "{name}": say {", ".join(COMMANDS)}, or --help')
    values = flags.FlagValues()
    COMMANDS[name].define(values)
    bare = itertools.takewhile(lambda word: not word.startswith("-"), rest)
    named = [f"--{flag}={word}" for flag, word in zip(COMMANDS[name].words, bare, strict=False)]
    rest = named + rest[len(named) :]
    if any(word in HELP[:2] for word in rest):
        sys.stdout.write(flag_help(name, values) + "\n")
        return
    try:
        left = values(["longlive", *rest])[1:]
    except flags.Error as error:
        raise InputError(f"{error} (longlive {name} --help lists the flags)") from error
    if left:
        raise InputError(
            f'do not know what to do with "{left[0]}"; quote a prompt of several words'
        )
    COMMANDS[name].run(values, load)


def run(arguments: Sequence[str], load: Load = load_model) -> int:
    """Runs the command and returns its exit code; `load` is what makes a model of a name."""
    try:
        dispatch(arguments, load)
    except InputError as error:
        sys.stderr.write(f"longlive: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("longlive: stopped\n")
        return 130
    return 0


def main() -> None:
    """The console script. Being told to end (SIGTERM) is treated like Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.exit(run(sys.argv[1:]))
