"""The command `longlive`: reads flags, runs one subcommand, turns errors into sentences.

Exit codes: 0 done, 2 bad input (one sentence on stderr), 130 stopped by Ctrl-C or SIGTERM, 141
nobody reads the standard output any more.
Nothing here imports JAX until the flags have been read, so that bad input is answered at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags

from longlive_jax import cache_dir, interrupts, terminal
from longlive_jax.commands import (
    bench,
    convert,
    data,
    doctor,
    evaluate,
    generate,
    merge_lora,
    plan,
    quantize,
)
from longlive_jax.commands.shared import Load
from longlive_jax.errors import EmulationWarning, InputError
from longlive_jax.version import __version__

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


def _command(what: str, module: Any, **choices: Any) -> Command:
    return Command(what, module.define, module.run, **choices)


COMMANDS = {
    "generate": _command("make a video from prompts", generate),
    "bench": _command("measure speed and memory", bench),
    "eval": _command("measure how well videos follow their prompts", evaluate),
    "convert": _command("read published weights, or write them out again", convert),
    "merge-lora": _command("add a LoRA into a model's weights", merge_lora),
    "quantize": _command("keep a model's matrices in fewer bits", quantize),
    "plan": _command("say whether a video fits in a GPU's memory", plan),
    "data": _command(
        "say what is wrong in a folder of training videos", data, words=("task", "dir")
    ),
    "doctor": _command("say what runs here, and mend what does not", doctor),
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
    defined = values.flags_by_module_dict().values()
    for flag in itertools.chain.from_iterable(defined):
        default = "" if flag.default in (None, "", []) else f" [{flag.default}]"
        lines.append(f"  --{flag.name:<10}{' '.join(flag.help.split())}{default}")
    return "\n".join(lines)


def spelled(word: str, values: flags.FlagValues) -> str:
    """An argument, with underscores where a flag has them and dashes were written."""
    name, sign, value = word.partition("=")
    known = name.removeprefix("--")
    if not name.startswith("--") or known in values or known.replace("-", "_") not in values:
        return word
    return f"--{known.replace('-', '_')}{sign}{value}"


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
    rest = [spelled(word, values) for word in rest]
    if any(word in HELP[:2] for word in rest):
        sys.stdout.write(flag_help(name, values) + "\n")
        return
    try:
        left = values(["longlive", *rest])[1:]
    except flags.Error as error:
        raise InputError(f"{error} (longlive {name} --help lists the flags)") from error
    _check_once(values)
    if left:
        raise InputError(
            f'do not know what to do with "{left[0]}"; quote a prompt of several words'
        )
    COMMANDS[name].run(values, load)


def _check_once(values: flags.FlagValues) -> None:
    """Raises InputError for a flag that has one value and is there twice: which of them is meant
    cannot be told.
    """
    for name in values:
        flag = values[name]
        if flag.present > 1 and not isinstance(flag, flags.MultiFlag):
            raise InputError(f"--{name} has one value and is there {flag.present} times")


def run(arguments: Sequence[str], load: Load = load_model) -> int:
    """Runs the command and returns its exit code; `load` is what makes a model of a name."""
    message, code = "", 0
    try:
        with terminal.guarded(), _sentences():
            dispatch(arguments, load)
    except InputError as error:
        message, code = " ".join(str(error).split()), 2
    except KeyboardInterrupt:
        message, code = "stopped", interrupts.STOPPED
    except terminal.PipeClosedError:
        code = terminal.PIPE_CLOSED
    if message:
        terminal.Messages(sys.stderr).write(f"longlive: {message}\n")
    return code


@contextlib.contextmanager
def _sentences() -> Iterator[None]:
    """Print warnings as sentences on stderr, like errors. A compilation cache that cannot be
    written is reported once, not for each of its programs.
    """
    usual = warnings.showwarning
    said: set[str] = set()

    def show(message: Any, category: type[Warning], *where: Any) -> None:
        if issubclass(category, EmulationWarning):
            sys.stderr.write(f"longlive: {message}\n")
        elif cache_dir.FAILED in str(message):
            if not said:
                sys.stderr.write(f"longlive: {cache_dir.failure(str(message))}\n")
            said.add(cache_dir.FAILED)
        else:
            usual(message, category, *where)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def main() -> None:
    """The console script. SIGTERM is treated like Ctrl-C; see `interrupts`."""
    terminal.open_standard_streams()
    interrupts.stop.listen()
    code = run(sys.argv[1:])
    interrupts.stop.end()
    if code in (2, terminal.PIPE_CLOSED):
        terminal.forget_output()
    sys.exit(code)
