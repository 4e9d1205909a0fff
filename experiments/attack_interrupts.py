"""Ctrl-C and SIGTERM at random moments, in a session's calls and in commands.

    python experiments/attack_interrupts.py --count 300

In one process: `next_chunk`, `switch` and `save` of a session are interrupted, and the session is
compared with one that was not. In processes of their own: `generate --save-session`, `quantize` and
`convert`, each with one signal after its handlers are there. Nothing that was handed over may be
lost, the session must go on with the same frames, the exit code must be 0 or 130, standard error
must end in a sentence, and files must be whole or absent. Exit code 1 if that was not so.
"""

import collections
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import av
import numpy as np
from absl import app, flags, logging

import longlive_jax
from longlive_jax import output
from longlive_jax.errors import InputError

CALLS = ("next_chunk", "switch", "save")
COMMANDS = ("generate", "quantize", "convert")

_KINDS = flags.DEFINE_list("kinds", [*CALLS, *COMMANDS], "What is interrupted.")
_COUNT = flags.DEFINE_integer("count", 30, "Interrupts of each kind.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
_JSON = flags.DEFINE_string("json", None, "Where to write the counts.")

PROMPTS = (
    "a red circle moves left over a black background",
    "a blue circle moves left over a black background",
)
PATIENCE = 120.0  # s that a command may take to end


class FoundError(Exception):
    """Something that must not happen."""


# Calls of a session, in this process.


@dataclasses.dataclass
class Pair:
    """A session that is interrupted, and its twin that is not."""

    session: longlive_jax.Session
    twin: longlive_jax.Session
    folder: pathlib.Path

    def check_next(self) -> None:
        """Both hand over the same frames."""
        if not np.array_equal(self.session.next_chunk(), self.twin.next_chunk()):
            raise FoundError("other frames than without the interrupt")

    def next_chunk(self, interrupted: Callable[[Callable[[], object]], object]) -> None:
        frames = interrupted(self.session.next_chunk)
        if frames is None:
            frames = self.session.next_chunk()
        if not np.array_equal(frames, self.twin.next_chunk()):
            raise FoundError("a chunk was lost, or has other frames")

    def switch(self, interrupted: Callable[[Callable[[], object]], object]) -> None:
        prompt = PROMPTS[self.twin.prompt == PROMPTS[0]]
        interrupted(lambda: self.session.switch(prompt))
        if self.session.prompt == prompt:  # else it is as if nobody had asked for it
            self.twin.switch(prompt)
        self.check_next()

    def save(self, interrupted: Callable[[Callable[[], object]], object]) -> None:
        earlier = self.session.fork()
        self.session.save(self.folder)
        self.check_next()
        interrupted(lambda: self.session.save(self.folder))
        held = longlive_jax.restore(self.folder, model=self.session.model)
        frames = held.next_chunk()
        if not any(np.array_equal(frames, x.next_chunk()) for x in (earlier, self.session.fork())):
            raise FoundError("the folder holds neither the earlier session nor the later one")
        self.check_next()
        if len(os.listdir(self.folder)) != 2 or len(os.listdir(self.folder.parent)) != 1:
            raise FoundError(f"files are left beside the session: {os.listdir(self.folder)}")


def calls(kind: str, count: int, rng: random.Random) -> collections.Counter:
    """Interrupts one call of a session again and again."""
    found: collections.Counter = collections.Counter()
    model = longlive_jax.load("tiny")
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(*(_begun(model) for _ in range(2)), pathlib.Path(folder) / "session")
        lengths = []

        def timed(act: Callable[[], object]) -> object:
            start = time.perf_counter()
            result = act()
            lengths.append(time.perf_counter() - start)
            return result

        for _ in range(5):  # the first ones compile
            getattr(pair, kind)(timed)
        for _ in range(count):
            delay = rng.uniform(0.0, min(lengths))
            try:
                getattr(pair, kind)(lambda act, delay=delay: _interrupted(act, delay, found))
            except (FoundError, InputError, RuntimeError) as error:
                found[f"FAULT {type(error).__name__}: {error}"] += 1
                pair.session = pair.twin.fork()
    return found


def _begun(model: longlive_jax.Model) -> longlive_jax.Session:
    session = model.session(PROMPTS[0], history=2)
    session.next_chunk()
    session.switch(PROMPTS[1])
    session.next_chunk()
    session.next_chunk()
    return session


def _interrupted(act: Callable[[], object], delay: float, found: collections.Counter) -> object:
    """Press Ctrl-C `delay` seconds after `act` begins. Return its result, None if it was raised."""
    pressed = threading.Thread(target=_press, args=(delay,))
    result = None
    try:
        pressed.start()
        result = act()
        pressed.join()
        _run_handlers()
    except KeyboardInterrupt:
        found["in the call" if result is None else "after the call"] += 1
    else:
        raise FoundError("the interrupt was swallowed")
    pressed.join()
    return result


def _press(delay: float) -> None:
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGINT)


def _run_handlers() -> None:
    """A signal that came meanwhile is handled before this returns."""
    time.sleep(0.001)


# Commands, in processes.


@dataclasses.dataclass(frozen=True)
class Command:
    """A command in a folder of its own, and what must be true of the folder when it has ended."""

    words: tuple[str, ...]
    check: Callable[[pathlib.Path, int], None]


def commands(kind: str, count: int, rng: random.Random) -> collections.Counter:
    """Sends a signal to a command at a random moment, again and again."""
    found: collections.Counter = collections.Counter()
    length = _length(COMMAND[kind])
    for number in range(count):
        with tempfile.TemporaryDirectory() as name:
            how = (signal.SIGINT, signal.SIGTERM)[number % 2]
            try:
                found[
                    _signalled(COMMAND[kind], how, rng.uniform(0, length), pathlib.Path(name))
                ] += 1
            except (FoundError, InputError, av.FFmpegError, OSError) as error:
                found[f"FAULT {how.name} {type(error).__name__}: {error}"] += 1
    return found


def _length(command: Command) -> float:
    """Seconds from the handlers being there to the end, with what is compiled already on disk."""
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            shutil.rmtree(folder)
            os.mkdir(folder)
            process = _started(command, pathlib.Path(folder))
            start = time.perf_counter()
            process.communicate()
    return time.perf_counter() - start


def _started(command: Command, folder: pathlib.Path) -> subprocess.Popen:
    """The process, once it handles signals."""
    words = [sys.executable, "-m", "longlive_jax", *command.words]
    process = subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not _catches(process.pid, signal.SIGTERM):
        time.sleep(0.005)
    return process


def _catches(pid: int, number: signal.Signals) -> bool:
    status = pathlib.Path(f"/proc/{pid}/status").read_text("utf-8")
    caught = re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def _signalled(command: Command, how: signal.Signals, delay: float, folder: pathlib.Path) -> str:
    process = _started(command, folder)
    time.sleep(delay)
    process.send_signal(how)
    try:
        _, said = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.communicate()
        raise FoundError(f"still running after {PATIENCE:.0f} s") from error
    code = process.returncode
    if code not in (0, 130):
        raise FoundError(f"exit code {code}: {said[-300:]}")
    if "Traceback" in said or (code == 130 and not said.endswith("longlive: stopped\n")):
        raise FoundError(f"no sentence: {said[-300:]}")
    hidden = [name for name in os.listdir(folder) if name.startswith(".")]
    if hidden:
        raise FoundError(f"left behind: {hidden}")
    command.check(folder, code)
    return f"exit code {code}"


def _check_video(folder: pathlib.Path, code: int) -> None:
    video, session, report = (folder / x for x in ("out.mp4", "session", "report.json"))
    there = {path.exists() for path in (video, session, report)}
    if len(there) == 2 or (code == 0 and there == {False}):
        raise FoundError(f"of video, session and report only these are there: {os.listdir(folder)}")
    if there == {False}:
        return
    with av.open(str(video)) as container:
        frames = sum(1 for _ in container.decode(video=0))
    told = json.loads(report.read_text("utf-8"))["frames"]
    held = longlive_jax.restore(session).frame
    if not frames == told == held:
        raise FoundError(
            f"{frames} frames in the video, {told} in the report, {held} in the session"
        )


def _check_model(folder: pathlib.Path, code: int) -> None:
    made = folder / "made"
    if made.exists():
        longlive_jax.load(made)
    elif code == 0:
        raise FoundError("nothing was written")


COMMAND = {
    "generate": Command(
        (
            *("generate", "--prompt", PROMPTS[0], "--at", f"1: {PROMPTS[1]}", "--seconds=3"),
            *("--json=report.json", "--save-session=session"),
        ),
        _check_video,
    ),
    "quantize": Command(("quantize", "--precision=int8", "--output=made"), _check_model),
    "convert": Command(
        (
            *("convert", "--dtype=float32", "--to=made"),
            f"--from={pathlib.Path(longlive_jax.__file__).parent / 'models' / 'tiny'}",
        ),
        _check_model,
    ),
}


def attack(kinds: list[str], count: int, seed: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Each kind and what was seen, how often. What must not happen begins with "FAULT"."""
    for kind in kinds:
        act = calls if kind in CALLS else commands
        yield kind, dict(act(kind, count, random.Random(seed)))


def main(_):
    unknown = set(_KINDS.value) - {*CALLS, *COMMANDS}
    if unknown:
        raise app.UsageError(
            f"--kinds: there is no {min(unknown)}: say {', '.join(CALLS + COMMANDS)}"
        )
    logging.set_verbosity(logging.WARNING)
    # Shells have processes in the background ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seen = {}
    for kind, counts in attack(_KINDS.value, _COUNT.value, _SEED.value):
        sys.stdout.write(f"{kind}: {counts}\n")
        sys.stdout.flush()
        seen[kind] = counts
    if _JSON.value:
        output.write_report(pathlib.Path(_JSON.value), json.dumps(seen, indent=1) + "\n")
    return int(any(name.startswith("FAULT") for counts in seen.values() for name in counts))


if __name__ == "__main__":
    app.run(main)
