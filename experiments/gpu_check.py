"""Checks and times this checkout on a GPU, in at most eight minutes.

python experiments/gpu_check.py

It runs from a plain checkout: only JAX for the GPU, flax and numpy have to be installed, with their
dependencies. `parts` below lists what is measured, the most important first, and
`experiments/README.md` describes it. Without a GPU, the tiny model replaces the presets.

Every part is a process with a time limit, because a wrong kernel can hang, or leave a GPU on which
nothing works until the process ends. That costs the entry which was being measured; a new process
continues with the next one. The report on disk is updated after every entry, so that an interrupt
loses nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICES = ROOT / "experiments" / "devices"
SCHEMA = 1
LEAST_S = 5.0  # a part with less time left is not started
POLL_S = 0.1
CPU_FACTOR = 4.0  # of the time limits, where there is no GPU
LINES = 12  # of the output of a process that failed, kept in the report
ENDED = ("ok", "failed", "timed out", "skipped")
# A part has the first of these states that one of its entries has.
STATES = ("begun", "interrupted", "failed", "timed out", "not reached", "ok", "skipped")

# The most promising first.
BACKENDS = ("cudnn", "mosaic", "tokamax", "xla")
PRESETS = {"1.3b": "wan21_1_3b", "5b": "wan22_5b"}
WINDOW, TABLE = "attention/sink_window", "attention/chunk_table"


@dataclasses.dataclass(frozen=True)
class Part:
    """A program that measures entries, one after the other.

    Args:
      name: Name in the report; its first word can be given to `--only`.
      command: Program; the results file, `arguments` and the remaining entries are appended.
      entries: Names of what it measures.
      limit_s: Time limit of the part, in seconds.
      silence_s: Longest time between two results, in seconds.
      environment: Environment variables to set.
      arguments: Arguments between the results file and the entries.
      unfit: Reason not to run it; empty to run it.
    """

    name: str
    command: tuple[str, ...]
    entries: tuple[str, ...]
    limit_s: float
    silence_s: float
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    unfit: str = ""

    def standing_in(self) -> Part:
        """The same part where there is no GPU: limits are longer, and since times on a CPU are not
        of interest, programs are compiled with few optimisations.
        """
        limits = dict(limit_s=self.limit_s * CPU_FACTOR, silence_s=self.silence_s * CPU_FACTOR)
        environment = {**self.environment, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        return dataclasses.replace(self, **limits, environment=environment)


def module(name: str) -> tuple[str, ...]:
    """The command of a program in `gpu_checks`."""
    return sys.executable, "-m", f"gpu_checks.{name}"


DEVICE = Part("device", module("device"), ("facts", "peaks"), 75.0, 60.0)
ON_CPU = {"JAX_PLATFORMS": "cpu"}


def parts(facts: Mapping[str, Any], tiny: bool, scratch: pathlib.Path) -> list[Part]:
    """What is measured after the device's facts, the most important first.

    Args:
      facts: Facts of the device.
      tiny: Whether the tiny model replaces the presets.
      scratch: Folder for files of this run.
    """
    kind, on_cpu = str(facts.get("kind", "")), facts.get("platform") == "cpu"
    sizes = {"tiny": "tiny"} if tiny else PRESETS
    forms = {
        form: tuple(f"{preset}, {form}" for preset in sizes.values())
        for form in ("formula", "compiled")
    }
    cpu, device = (str(scratch / f"frames_{name}.npz") for name in ("cpu", "device"))
    memory, toy = module("memory"), module("toy")
    found = [
        *(_attention("attention", name, _streams(sizes), on_cpu) for name in BACKENDS),
        *(_bench(preset) for preset in sizes.values()),
        Part("memory", memory, forms["formula"], 60.0, 45.0, ON_CPU, (kind,)),
        Part("toy CPU", toy, ("frames",), 90.0, 90.0, ON_CPU, (cpu, device)),
        Part("toy device", toy, ("frames", "difference"), 90.0, 90.0, {}, (device, cpu)),
        *(_attention("training", name, _training(sizes), on_cpu) for name in BACKENDS),
    ]
    if not tiny:  # compiles for a minute or more each
        found.append(
            Part("memory compiled", memory, forms["compiled"], 300.0, 200.0, ON_CPU, (kind,))
        )
    return [part.standing_in() for part in found] if on_cpu else found


def _attention(word: str, backend: str, entries: tuple[str, ...], on_cpu: bool) -> Part:
    unfit = "needs a GPU" if on_cpu and backend != "xla" else ""
    command = module("attention")
    return Part(f"{word} {backend}", command, entries, 50.0, 40.0, {}, (backend,), unfit)


def _bench(preset: str) -> Part:
    limit_s = 150.0 if preset == "wan22_5b" else 100.0
    chunks = "3" if preset == "tiny" else "6"  # of each video; the window is full after four
    entries = ("best", "xla", "best, switch")
    return Part(f"bench {preset}", module("model"), entries, limit_s, limit_s, {}, (preset, chunks))


def _streams(sizes: Sequence[str]) -> tuple[str, ...]:
    """Attention of a chunk over a full window, of recaching, and over quantised slots."""
    bits = [
        f"{WINDOW} {kind} @ {size}_chunk" for kind in ("int8", "fp8", "nvfp4") for size in sizes
    ]
    plain = [f"{WINDOW} @ {size}_{call}" for call in ("chunk", "recache") for size in sizes]
    return *plain, *bits


def _training(sizes: Sequence[str]) -> tuple[str, ...]:
    """Attention of teacher forcing, and gradients."""
    lengths = {"tiny": "tiny_12"} | {size: f"{size}_16s" for size in PRESETS}
    forward = [f"{TABLE} @ {lengths[size]}" for size in sizes]
    gradients = [f"{TABLE} gradient @ {lengths[size]}" for size in sizes]
    streams = [f"{WINDOW} gradient @ {size}_chunk" for size in sizes]
    return *forward, *streams, *gradients


class Report:
    """The report, in memory and on disk.

    Args:
      path: The file; None chooses a name from the device and the date, once the device is known.
      budget_s: Time limit of the whole run, in seconds.
    """

    def __init__(self, path: pathlib.Path | None, budget_s: float):
        self._began = time.monotonic()
        self._path = path
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "budget_s": budget_s,
            "took_s": 0.0,
            "complete": False,
            "left_out": {},
            "parts": {},
        }

    @property
    def path(self) -> pathlib.Path:
        if self._path is None:
            self._path = free_name(self.facts.get("kind", "unknown"), self.content["started"][:10])
        return self._path

    @property
    def facts(self) -> Mapping[str, Any]:
        """Facts of the device; empty while they are not known."""
        device = self.content["parts"].get(DEVICE.name, {})
        return device.get("entries", {}).get("facts", {})

    def write(self) -> None:
        """Replaces the file on disk in one step."""
        self.content["took_s"] = round(time.monotonic() - self._began, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            unfinished.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
            os.replace(unfinished, self.path)
        finally:
            unfinished.unlink(missing_ok=True)


def free_name(device: str, date: str, folder: pathlib.Path = DEVICES) -> pathlib.Path:
    """An unused file name, such as nvidia-h100-80gb-hbm3-2026-12-01.json, or with -2 at its end."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path, number = folder / f"{slug}-{date}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{slug}-{date}-{number}.json"
    return path


class Child:
    """A process of a part, with its results and output."""

    def __init__(self, part: Part, entries: Sequence[str], scratch: pathlib.Path):
        self._results, self._output = (
            scratch / f"{kind}_{time.monotonic_ns()}" for kind in ("results", "output")
        )
        self._results.touch()
        self._read = 0
        command = [*part.command, str(self._results), *part.arguments, *entries]
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=surroundings(scratch) | part.environment,
                cwd=scratch,
                start_new_session=True,
            )

    def new_results(self) -> list[dict[str, Any]]:
        """Complete lines of results since the last call."""
        with self._results.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]

    def last_lines(self) -> str:
        """The end of its output, without names of folders of this machine."""
        text = self._output.read_text("utf-8", errors="replace")
        for folder, name in ((ROOT, "."), (sys.prefix, "<python>"), (pathlib.Path.home(), "~")):
            text = text.replace(str(folder), name)
        return "\n".join(text.splitlines()[-LINES:])

    def end(self) -> None:
        """Kills it and the processes that it started, unless it has ended."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def surroundings(scratch: pathlib.Path) -> dict[str, str]:
    """The environment of every part: import path, share of GPU memory, compilation cache."""
    folders = [str(scratch), str(ROOT), str(ROOT / "experiments")]
    defaults = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",  # the 5B needs more than the default
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "xla"),
    }
    existing = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*folders, existing] if existing else folders)
    return defaults | os.environ | {"PYTHONPATH": path}


@contextlib.contextmanager
def folder() -> Iterator[pathlib.Path]:
    """A folder for this run, in which `kernels` can be imported as `longlive_kernels`."""
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as name:
        made = pathlib.Path(name)
        (made / "longlive_kernels").symlink_to(ROOT / "kernels", target_is_directory=True)
        yield made


def run_part(
    part: Part, until: float, scratch: pathlib.Path, update: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Runs a part until all entries have ended or its time is up, in a new process after a failure.

    Args:
      part: The part to run.
      until: End of the whole run, in seconds of `time.monotonic`.
      scratch: Folder for files of this run.
      update: Called with the summary of the part whenever it has changed.

    Returns:
      The summary of the part, with its entries.
    """
    began = time.monotonic()
    end = min(until, began + part.limit_s)
    entries = {name: {"state": "not reached"} for name in part.entries}
    summary = {"state": "not reached", "took_s": 0.0, "entries": entries}

    def record() -> None:
        summary["state"] = state_of(entries.values())
        summary["took_s"] = round(time.monotonic() - began, 1)
        update(summary)

    try:
        while end - time.monotonic() >= LEAST_S:
            left = [name for name in entries if entries[name]["state"] not in ENDED]
            if not left:
                break
            _run_once(part, left, end, scratch, entries, record)
    finally:
        record()
    return summary


def _run_once(
    part: Part,
    left: Sequence[str],
    end: float,
    scratch: pathlib.Path,
    entries: dict[str, dict[str, Any]],
    record: Callable[[], None],
) -> None:
    """Runs a process of a part on the entries `left` and records how they ended."""
    child, last, problem = Child(part, left, scratch), time.monotonic(), None
    try:
        while problem is None:
            status = child.process.poll()  # before reading: all results are there when it has ended
            lines = child.new_results()
            for line in lines:
                entries[line.pop("entry")] = line
            now = time.monotonic()
            last = now if lines else last
            if lines:
                record()
            if status is not None:
                problem = ("failed", f"it ended with status {status}")
            elif now > end:
                problem = ("timed out", "the time of its part was up")
            elif now - last > part.silence_s:
                problem = ("timed out", f"nothing came for {part.silence_s:g} s")
            else:
                time.sleep(POLL_S)
    except BaseException:
        for name in left:
            if entries[name]["state"] == "begun":
                entries[name]["state"] = "interrupted"
        raise
    finally:
        child.end()
    _close(left, entries, problem, child.last_lines())


def _close(
    left: Sequence[str], entries: dict[str, dict[str, Any]], problem: tuple[str, str], text: str
) -> None:
    """Blames the entry that was being measured for a failure, or all of them where none was begun:
    then the program does not start.
    """
    state, why = problem
    begun = [name for name in left if entries[name]["state"] == "begun"]
    started = begun or any(entries[name]["state"] in ENDED for name in left)
    for name in begun if started else left:
        entries[name].update(state=state, why=why, output=text)


def state_of(entries: Sequence[Mapping[str, Any]]) -> str:
    """The state of a part, from the states of its entries."""
    found = {entry["state"] for entry in entries}
    return next((state for state in STATES if state in found), "begun")


def check(report: Report, only: Sequence[str], tiny: bool | None, budget_s: float) -> None:
    """Runs all parts.

    Args:
      report: Receives the results.
      only: First words of the parts to run; empty runs all. The device's facts are always read.
      tiny: Whether the tiny model replaces the presets; None: where there is no GPU.
      budget_s: Time limit of the whole run, in seconds.
    """
    until = time.monotonic() + budget_s
    with folder() as scratch:
        one_part(report, DEVICE, until, scratch)
        on_cpu = report.facts.get("platform") == "cpu"
        if tiny is None:
            tiny = on_cpu
        if tiny:
            why = "there is no GPU" if on_cpu else "--model tiny"
            reason = f"{why}: replaced by the tiny model"
            report.content["left_out"] = dict.fromkeys(PRESETS.values(), reason)
        if on_cpu:
            reason = "programs for the CPU are compiled with few optimisations: times mean nothing"
            report.content["left_out"]["optimisations"] = reason
        for part in parts(report.facts, tiny, scratch):
            unfit = "--only" if only and part.name.split()[0] not in only else part.unfit
            if unfit:
                summary = {"state": "skipped", "why": unfit, "took_s": 0.0, "entries": {}}
                report.content["parts"][part.name] = summary
            else:
                one_part(report, part, until, scratch)
    report.content["complete"] = True
    report.write()


def one_part(report: Report, part: Part, until: float, scratch: pathlib.Path) -> None:
    """Runs a part and updates the report on disk after each result."""

    def update(summary: dict[str, Any]) -> None:
        report.content["parts"][part.name] = summary
        if part.name.startswith("memory"):
            beside_measured(report.content["parts"], summary["entries"])
        if part is not DEVICE:  # until the device is known, the report has no name
            report.write()

    summary = run_part(part, until, scratch, update)
    report.write()
    sys.stderr.write(f"{part.name}: {summary['state']}, {summary['took_s']:.0f} s\n")


def beside_measured(found: Mapping[str, Any], entries: Mapping[str, dict[str, Any]]) -> None:
    """Adds the measured peak to plans, and its ratio to the planned one."""
    for name, entry in entries.items():
        bench = found.get(f"bench {name.split(',')[0]}", {})
        peak = bench.get("entries", {}).get("best", {}).get("report", {}).get("peak_memory_bytes")
        if peak and "expected_bytes" in entry:
            entry |= {"measured_bytes": peak, "of_expected": peak / entry["expected_bytes"]}


def main() -> int:
    """Reads flags and runs all parts.

    Returns:
      The exit code: 1 where a part failed or timed out, 130 where the run was interrupted.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=480.0, help="time limit of the whole run")
    parser.add_argument("--json", type=pathlib.Path, help="file of the report")
    parser.add_argument(
        "--only",
        default="",
        help="first words of the parts to run, such as attention,bench; default: all",
    )
    parser.add_argument(
        "--model",
        choices=["auto", "tiny"],
        default="auto",
        help="auto: both presets where there is a GPU",
    )
    flags = parser.parse_args()
    words = {part.name.split()[0] for part in parts({}, False, pathlib.Path())}
    only = [word.strip() for word in flags.only.split(",") if word.strip()]
    if unknown := sorted(set(only) - words):
        parser.error(f"--only knows {', '.join(sorted(words))}, not {', '.join(unknown)}")
    if not flags.seconds > 0:
        parser.error(f"--seconds must be more than 0, not {flags.seconds:g}")
    report = Report(flags.json, flags.seconds)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        check(report, only, True if flags.model == "tiny" else None, flags.seconds)
    except KeyboardInterrupt:
        report.write()
        return 130
    finally:
        sys.stderr.write(f"{report.path}\n")
    states = [part["state"] for part in report.content["parts"].values()]
    return int(any(state in ("failed", "timed out") for state in states))


if __name__ == "__main__":
    sys.exit(main())
