"""What a GPU says of this checkout, in at most eight minutes: python experiments/gpu_check.py

For the day when a GPU is at hand for a short time. Nothing has to be installed of this project: it
needs JAX for the GPU, flax and what these bring. What is measured is in `PARTS` below, in order of
worth; `experiments/README.md` says what each part gives. Without a GPU the tiny model stands in.

Every part is a process with a time limit: a wrong kernel may wait for ever, or leave a GPU on which
nothing runs any more. That costs the one entry that was being measured; the part begins anew with
the next one. The report is complete on disk after every entry, so that an interrupt loses nothing.
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
LEAST_S = 5.0  # a part that has less is not begun
POLL_S = 0.1
LINES = 12  # of what a part has written, that are kept where it fails
ENDED = ("ok", "failed", "timed out", "skipped")
# The first of them that an entry has is the state of its part.
STATES = ("begun", "interrupted", "failed", "timed out", "not reached", "ok", "skipped")

# The best first, as far as is known before the first run.
BACKENDS = ("cudnn", "mosaic", "tokamax", "xla")
PRESETS = {"1.3b": "wan21_1_3b", "5b": "wan22_5b"}
WINDOW, TABLE = "attention/sink_window", "attention/chunk_table"


@dataclasses.dataclass(frozen=True)
class Part:
    """A program that measures entries, one after the other.

    Args:
      name: In the report; begins with a word that `--only` takes.
      command: What is run; the file for its results and the entries that are left are added.
      entries: What it measures.
      limit_s: For all of them.
      silence_s: Between two results; what is being measured then is given up.
      environment: Variables that are set for it.
      arguments: Those between the file for results and the entries.
      unfit: Why it is not run; empty if it is.
    """

    name: str
    command: tuple[str, ...]
    entries: tuple[str, ...]
    limit_s: float
    silence_s: float
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    unfit: str = ""

    def patient(self, times: float) -> Part:
        """The same part with that many times the time."""
        limits = dict(limit_s=self.limit_s * times, silence_s=self.silence_s * times)
        return dataclasses.replace(self, **limits)


def module(name: str) -> tuple[str, ...]:
    """The command of a program in `gpu_checks`."""
    return sys.executable, "-m", f"gpu_checks.{name}"


DEVICE = Part("device", module("device"), ("facts", "peaks"), 75.0, 60.0)
ON_CPU = {"JAX_PLATFORMS": "cpu"}
PATIENCE = 4.0  # times the limits of a part, where CPUs stand in: nobody waits to have them back


def parts(facts: Mapping[str, Any], tiny: bool, scratch: pathlib.Path) -> list[Part]:
    """What is measured after the device's facts, in order of worth.

    Args:
      facts: Of the device.
      tiny: Whether the tiny model stands in for the presets.
      scratch: A folder for files of this run.
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
    if not tiny:  # a minute or more for each, of CPUs alone
        found.append(
            Part("memory compiled", memory, forms["compiled"], 300.0, 200.0, ON_CPU, (kind,))
        )
    return [part.patient(PATIENCE) for part in found] if on_cpu else found


def _attention(word: str, backend: str, entries: tuple[str, ...], on_cpu: bool) -> Part:
    unfit = "needs a GPU" if on_cpu and backend != "xla" else ""
    command = module("attention")
    return Part(f"{word} {backend}", command, entries, 50.0, 40.0, {}, (backend,), unfit)


def _bench(preset: str) -> Part:
    # A window is full after four chunks.
    limit_s, chunks = {"tiny": (100.0, "3"), "wan21_1_3b": (100.0, "6"), "wan22_5b": (150.0, "6")}[
        preset
    ]
    entries = ("best", "xla", "best, switch")
    return Part(f"bench {preset}", module("model"), entries, limit_s, limit_s, {}, (preset, chunks))


def _streams(sizes: Sequence[str]) -> tuple[str, ...]:
    """Attention of a chunk over a full window, of reading a window again, of quantised slots."""
    bits = [
        f"{WINDOW} {kind} @ {size}_chunk" for kind in ("int8", "fp8", "nvfp4") for size in sizes
    ]
    plain = [f"{WINDOW} @ {size}_{call}" for call in ("chunk", "recache") for size in sizes]
    return *plain, *bits


def _training(sizes: Sequence[str]) -> tuple[str, ...]:
    """Gradients, and attention of teacher forcing."""
    lengths = {"tiny": "tiny_12"} | {size: f"{size}_16s" for size in PRESETS}
    forward = [f"{TABLE} @ {lengths[size]}" for size in sizes]
    gradients = [f"{TABLE} gradient @ {lengths[size]}" for size in sizes]
    streams = [f"{WINDOW} gradient @ {size}_chunk" for size in sizes]
    return *forward, *streams, *gradients


class Report:
    """The report, and the file that always holds what is known by now.

    Args:
      path: Where it goes; None is a name of the device and the date, once the device is known.
      budget_s: Of the whole run.
    """

    def __init__(self, path: pathlib.Path | None, budget_s: float):
        self._began = time.monotonic()
        self._path = path
        self.said: dict[str, Any] = {
            "schema": SCHEMA,
            "begun": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "budget_s": budget_s,
            "took_s": 0.0,
            "complete": False,
            "left_out": {},
            "parts": {},
        }

    @property
    def path(self) -> pathlib.Path:
        if self._path is None:
            self._path = free_name(self.facts.get("kind", "unknown"), self.said["begun"][:10])
        return self._path

    @property
    def facts(self) -> Mapping[str, Any]:
        """Of the device; empty where they are not known."""
        device = self.said["parts"].get(DEVICE.name, {})
        return device.get("entries", {}).get("facts", {})

    def write(self) -> None:
        """Puts the report on disk, in one step."""
        self.said["took_s"] = round(time.monotonic() - self._began, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            unfinished.write_text(json.dumps(self.said, indent=2) + "\n", encoding="utf-8")
            os.replace(unfinished, self.path)
        finally:
            unfinished.unlink(missing_ok=True)


def free_name(device: str, date: str, folder: pathlib.Path = DEVICES) -> pathlib.Path:
    """A name that no report has: such as nvidia-h100-80gb-hbm3-2026-12-01.json, …-2.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path, number = folder / f"{slug}-{date}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{slug}-{date}-{number}.json"
    return path


class Child:
    """A running part: its results as they come, and the end of it and of what it has started."""

    def __init__(self, part: Part, entries: Sequence[str], scratch: pathlib.Path):
        self._results, self._written = (
            scratch / f"{kind}_{time.monotonic_ns()}" for kind in ("results", "written")
        )
        self._results.touch()
        self._read = 0
        command = [*part.command, str(self._results), *part.arguments, *entries]
        with self._written.open("wb") as written:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=subprocess.STDOUT,
                env=surroundings(scratch) | part.environment,
                cwd=scratch,
                start_new_session=True,
            )

    def heard(self) -> list[dict[str, Any]]:
        """Results since the last time; of a line that is being written nothing."""
        with self._results.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]

    def last_lines(self) -> str:
        """The end of what it has written, without the names of folders of this machine."""
        text = self._written.read_text("utf-8", errors="replace")
        for folder, name in ((ROOT, "."), (sys.prefix, "<python>"), (pathlib.Path.home(), "~")):
            text = text.replace(str(folder), name)
        return "\n".join(text.splitlines()[-LINES:])

    def end(self) -> None:
        """Ends it, and what it has started."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def surroundings(scratch: pathlib.Path) -> dict[str, str]:
    """The environment of every part: where sources are, what it may take, what parts share."""
    folders = [str(scratch), str(ROOT), str(ROOT / "experiments")]
    chosen = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",  # the 5B needs more of 80 GB than JAX would take
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "xla"),
    }
    theirs = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*folders, theirs] if theirs else folders)
    return chosen | os.environ | {"PYTHONPATH": path}


@contextlib.contextmanager
def folder() -> Iterator[pathlib.Path]:
    """A folder for this run, in which `kernels` has the name by which it is imported."""
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as name:
        made = pathlib.Path(name)
        (made / "longlive_kernels").symlink_to(ROOT / "kernels", target_is_directory=True)
        yield made


def run_part(
    part: Part, until: float, scratch: pathlib.Path, tell: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Runs a part, anew after what goes wrong, until all entries have ended or its time is up.

    Args:
      part: What to run.
      until: When the whole run ends, by `time.monotonic`.
      scratch: The run's folder.
      tell: Called with what is known of the part whenever that has changed.

    Returns:
      What the report says of the part.
    """
    began = time.monotonic()
    end = min(until, began + part.limit_s)
    entries = {name: {"state": "not reached"} for name in part.entries}
    said = {"state": "not reached", "took_s": 0.0, "entries": entries}

    def noted() -> None:
        said["state"] = state_of(entries.values())
        said["took_s"] = round(time.monotonic() - began, 1)
        tell(said)

    try:
        while end - time.monotonic() >= LEAST_S:
            left = [name for name in entries if entries[name]["state"] not in ENDED]
            if not left:
                break
            _run_once(part, left, end, scratch, entries, noted)
    finally:
        noted()
    return said


def _run_once(
    part: Part,
    left: Sequence[str],
    end: float,
    scratch: pathlib.Path,
    entries: dict[str, dict[str, Any]],
    noted: Callable[[], None],
) -> None:
    """Runs a part's program once, and notes what became of the entries that it was given."""
    child, last, problem = Child(part, left, scratch), time.monotonic(), None
    try:
        while problem is None:
            status = child.process.poll()  # before its results, of which none is missed so
            lines = child.heard()
            for line in lines:
                entries[line.pop("entry")] = line
            now = time.monotonic()
            last = now if lines else last
            if lines:
                noted()
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
    """Gives what went wrong to the entry that was being measured, or where none had been begun to
    all: the program does not start.
    """
    state, why = problem
    begun = [name for name in left if entries[name]["state"] == "begun"]
    started = begun or any(entries[name]["state"] in ENDED for name in left)
    for name in begun if started else left:
        entries[name].update(state=state, why=why, written=text)


def state_of(entries: Sequence[Mapping[str, Any]]) -> str:
    """The state of a part, from those of its entries."""
    found = {entry["state"] for entry in entries}
    return next((state for state in STATES if state in found), "begun")


def check(report: Report, only: Sequence[str], tiny: bool | None, budget_s: float) -> None:
    """Runs all parts.

    Args:
      report: Where results go.
      only: First words of the names of parts that are run, beside the device's; none is all.
      tiny: Whether the tiny model stands in for the presets; None is where there is no GPU.
      budget_s: Of the whole run.
    """
    until = time.monotonic() + budget_s
    with folder() as scratch:
        one_part(report, DEVICE, until, scratch)
        on_cpu = report.facts.get("platform") == "cpu"
        if tiny is None:
            tiny = on_cpu
        if tiny:
            why = "there is no GPU" if on_cpu else "--model tiny"
            reason = f"{why}: the tiny model stands in"
            report.said["left_out"] = dict.fromkeys(PRESETS.values(), reason)
        for part in parts(report.facts, tiny, scratch):
            unfit = "--only" if only and part.name.split()[0] not in only else part.unfit
            if unfit:
                said = {"state": "skipped", "why": unfit, "took_s": 0.0, "entries": {}}
                report.said["parts"][part.name] = said
            else:
                one_part(report, part, until, scratch)
    report.said["complete"] = True
    report.write()


def one_part(report: Report, part: Part, until: float, scratch: pathlib.Path) -> None:
    """Runs a part; the report is on disk after each of its results."""
    held = part is DEVICE  # before the device is known the report has no name

    def tell(said: dict[str, Any]) -> None:
        report.said["parts"][part.name] = said
        if part.name.startswith("memory"):
            beside_measured(report.said["parts"], said["entries"])
        if not held:
            report.write()

    said = run_part(part, until, scratch, tell)
    report.write()
    sys.stderr.write(f"{part.name}: {said['state']}, {said['took_s']:.0f} s\n")


def beside_measured(found: Mapping[str, Any], entries: Mapping[str, dict[str, Any]]) -> None:
    """Adds to plans what a run has taken, and how much of what the plan says that is."""
    for name, entry in entries.items():
        bench = found.get(f"bench {name.split(',')[0]}", {})
        peak = bench.get("entries", {}).get("best", {}).get("report", {}).get("peak_memory_bytes")
        if peak and "expected_bytes" in entry:
            entry |= {"measured_bytes": peak, "of_expected": peak / entry["expected_bytes"]}


def main() -> int:
    """Reads flags and runs all parts. The exit code is 1 where a part has failed, 130 where the run
    was interrupted.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=480.0, help="for the whole run")
    parser.add_argument("--json", type=pathlib.Path, help="the report's file")
    parser.add_argument(
        "--only", default="", help="first words of parts, such as attention,bench; else all"
    )
    parser.add_argument(
        "--model", choices=["auto", "tiny"], default="auto", help="auto: both presets on a GPU"
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
    states = [part["state"] for part in report.said["parts"].values()]
    return int(any(state in ("failed", "timed out") for state in states))


if __name__ == "__main__":
    sys.exit(main())
