"""Breaks lines of the package, one at a time, and sees which of them the tests notice.

python experiments/mutations.py --count=100 --seed=0 --output=runs/mutations.json

Each fault (`mutants.py`) is put into a copy of this checkout, and the tests that belong to its file
(`TESTS`) run until one fails. Every kind of fault is as likely as every other, whichever is the
most frequent in the sources. Stopped, the same command goes on. A fault that takes longer than
`--limit` seconds counts as found: its loop does not end. With `--show` the faults are listed, and
nothing runs. The survivors are for people to read: some change nothing that can be seen.
"""

import collections
import contextlib
import dataclasses
import fnmatch
import hashlib
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
import time

from absl import app, flags, logging
from mutants import KINDS, Mutant, find

from longlive_jax import output

_COUNT = flags.DEFINE_integer("count", 100, "Faults to try.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sample.")
_FILES = flags.DEFINE_list("files", ["*"], "Patterns of the files to break, such as */dit/*.")
_OUTPUT = flags.DEFINE_string("output", "mutations.json", "Where the results go.")
_LIMIT = flags.DEFINE_integer("limit", 900, "Seconds for the tests of one fault.", lower_bound=1)
_SHOW = flags.DEFINE_boolean("show", False, "List the faults and run nothing.")

ROOT = pathlib.Path(__file__).parents[1]
COPIED = ("longlive_jax", "kernels", "experiments", "tests", "pyproject.toml", "README.md")
NICENESS = 15
PATIENCE = 4  # times the limit, for tests that have no compiled programs yet

# The tests that belong to each file, those that are quick and see much first. A name is that of
# `tests/test_<name>.py`.
_WAN = ("dit", "longlive1")
_TABLE, _WINDOW = ("chunk_table", "dit"), ("sink_window", "cache")
_LINEAR = ("nvfp4_linear", "nvfp4_backends")
TESTS = {
    "longlive_jax/rollout.py": ("streaming", "cache", "session", "longlive1", "sequence"),
    "longlive_jax/session.py": ("session", "interrupts", "saved", "batch", "threads", "adapt"),
    "longlive_jax/sampler.py": ("sampler", "streaming", "pipeline", "longlive1"),
    "longlive_jax/clips.py": ("clips", "media", "data_folder"),
    "longlive_jax/filters.py": ("colours", "media"),
    "longlive_jax/fit.py": ("media", "colours"),
    "longlive_jax/flow.py": ("flow", "sampler", "flow_loss"),
    "longlive_jax/dit/attention.py": ("streaming", "cache", "dit", "sink_window", "lora"),
    "longlive_jax/dit/cache.py": ("cache", "streaming", "longlive1"),
    "longlive_jax/dit/mask.py": ("dit", "longlive1", "flow_loss"),
    "longlive_jax/dit/model.py": (*_WAN, "streaming", "training"),
    "longlive_jax/dit/parallel.py": ("ar",),
    "longlive_jax/dit/rope.py": ("rope", "dit", "cache"),
    "longlive_jax/dit/storage.py": ("storage", "streaming"),
    "longlive_jax/dit/timestep.py": ("timestep", "dit"),
    "longlive_jax/vae/build.py": ("fast_vae", "vae"),
    "longlive_jax/vae/fold.py": ("vae",),
    "longlive_jax/vae/layers.py": ("vae", "fast_vae"),
    "longlive_jax/vae/sharded.py": ("vae_sharded",),
    "longlive_jax/vae/tae.py": ("fast_vae",),
    "longlive_jax/vae/vae.py": ("vae", "session", "reconstruct"),
    "longlive_jax/train/ar.py": ("flow_loss", "ar", "trainer"),
    "longlive_jax/train/checkpoint.py": ("trainer", "distill"),
    "longlive_jax/train/collectives.py": ("train_plan", "cpu_devices", "ar"),
    "longlive_jax/train/distill.py": ("distill",),
    "longlive_jax/train/distill_run.py": ("distill", "experiments"),
    "longlive_jax/train/dmd.py": ("dmd", "distill"),
    "longlive_jax/train/export.py": ("train_export", "distill"),
    "longlive_jax/train/learning.py": ("lora", "distill"),
    "longlive_jax/train/linear_start.py": ("training", "vae"),
    "longlive_jax/train/loop.py": ("trainer", "distill"),
    "longlive_jax/train/metrics.py": ("trainer",),
    "longlive_jax/train/order.py": ("ar", "nvfp4_training"),
    "longlive_jax/train/plan.py": ("train_plan", "cpu_devices"),
    "longlive_jax/train/prompts.py": ("distill",),
    "longlive_jax/train/recycling.py": ("recycling", "trainer"),
    "longlive_jax/train/samples.py": ("trainer",),
    "longlive_jax/train/self_forcing.py": ("self_forcing", "dmd"),
    "longlive_jax/train/sequence.py": ("sequence", "distill"),
    "longlive_jax/train/source.py": ("trainer", "train_export"),
    "longlive_jax/train/state.py": ("training", "trainer"),
    "longlive_jax/train/step.py": ("trainer", "recycling", "ar"),
    "longlive_jax/train/teacher_forcing.py": ("training",),
    "longlive_jax/train/trainer.py": ("trainer", "train_export"),
    "longlive_jax/train/vae.py": ("training", "vae"),
    "longlive_jax/train/work.py": ("train_plan", "bench_train"),
    "longlive_jax/convert/export.py": ("convert", "convert_live"),
    "longlive_jax/convert/family.py": ("published", "scaled", "convert", "source"),
    "longlive_jax/convert/finite.py": ("damaged_checkpoints", "source"),
    "longlive_jax/convert/light.py": ("fast_vae", "convert"),
    "longlive_jax/convert/lora.py": ("lora_files", "lora", "convert", "quant"),
    "longlive_jax/convert/lora_names.py": ("lora_files", "lora"),
    "longlive_jax/convert/nvfp4.py": ("nvfp4_quantize", "convert"),
    "longlive_jax/convert/pickles.py": ("damaged_checkpoints", "source"),
    "longlive_jax/convert/run.py": ("convert", "convert_live"),
    "longlive_jax/convert/scaled.py": ("scaled", "convert"),
    "longlive_jax/convert/source.py": ("source", "convert"),
    "longlive_jax/convert/table.py": ("weights", "convert"),
    "longlive_jax/convert/tae.py": ("fast_vae", "convert"),
    "longlive_jax/convert/umt5.py": ("text_umt5", "convert"),
    "longlive_jax/convert/wan_dit.py": ("convert", "dit"),
    "longlive_jax/convert/wan_vae.py": ("vae", "convert"),
    "kernels/attention/chunk_table/reference.py": _TABLE,
    "kernels/attention/chunk_table/table.py": _TABLE,
    "kernels/attention/chunk_table/xla.py": _TABLE,
    "kernels/attention/chunk_table/vjp.py": _TABLE,
    "kernels/attention/sink_window/reference.py": _WINDOW,
    "kernels/attention/sink_window/rows.py": _WINDOW,
    "kernels/attention/sink_window/xla.py": _WINDOW,
    "kernels/attention/sink_window/vjp.py": _WINDOW,
    "kernels/nvfp4/exact.py": ("nvfp4_quantize", *_LINEAR),
    "kernels/nvfp4/format.py": ("nvfp4_quantize", *_LINEAR),
    "kernels/nvfp4/linear/vjp.py": _LINEAR,
    "kernels/nvfp4/matmul/reference.py": _LINEAR,
    "kernels/nvfp4/matmul/xla.py": _LINEAR,
    "kernels/nvfp4/quantize/hadamard.py": ("nvfp4_quantize",),
    "kernels/nvfp4/quantize/reference.py": ("nvfp4_quantize",),
}

FOUND, SURVIVED, ENDLESS = "found", "survived", "endless"


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of one fault. by: the first test that failed, or how the run ended."""

    file: str
    line: int
    kind: str
    before: str
    after: str
    outcome: str
    seconds: float
    by: str


def sample(sources: dict[str, str], count: int, seed: int) -> list[tuple[str, Mutant]]:
    """Faults of files, each at most once; a kind first, then one of that kind.

    Args:
      sources: The text of each file.
      count: Faults to draw; fewer come back where there are no more.
      seed: The same faults for the same seed and sources; a larger count goes on after the smaller.
    """
    rng = random.Random(seed)
    kinds: dict[str, list[tuple[str, Mutant]]] = {kind: [] for kind in KINDS}
    for file, text in sorted(sources.items()):
        for mutant in find(text):
            kinds[mutant.kind].append((file, mutant))
    for faults in kinds.values():
        rng.shuffle(faults)
    drawn = []
    while len(drawn) < count and any(kinds.values()):
        faults = kinds[rng.choice([kind for kind in KINDS if kinds[kind]])]
        drawn.append(faults.pop())
    return drawn


class Copy:
    """A copy of the checkout, in which tests run on the CPU at a low priority.

    Args:
      folder: An empty one, to copy to.
      limit: Seconds for one run of tests.
    """

    def __init__(self, folder: pathlib.Path, limit: int):
        self.tree, self.limit = folder / "tree", limit
        ignored = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")
        self.tree.mkdir()
        for name in COPIED:
            source, target = ROOT / name, self.tree / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=ignored)
            else:
                shutil.copy(source, target)
        (self.tree / "longlive_kernels").symlink_to("kernels")
        # Programs that a fault leaves as they are need not be compiled again.
        cache = dict(
            JAX_COMPILATION_CACHE_DIR=str(folder / "compiled"),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1",
            JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
        )
        place = dict(PYTHONPATH=str(self.tree), JAX_PLATFORMS="cpu", PYTHONDONTWRITEBYTECODE="1")
        self._environment = os.environ | cache | place

    @contextlib.contextmanager
    def broken(self, file: str, mutant: Mutant):
        """While the context is open, the fault is in the file."""
        path = self.tree / file
        text = path.read_text("utf-8")
        path.write_text(mutant.apply(text), "utf-8")
        try:
            yield
        finally:
            path.write_text(text, "utf-8")

    def test(self, *tests: str, limit: int | None = None) -> tuple[str, str]:
        """Runs tests until one fails.

        Args:
          tests: Files, or single tests by pytest's names for them.
          limit: Seconds that they may take, in the place of the copy's own.

        Returns:
          The outcome, and the test that failed or what else it is told by.
        """
        limit = limit or self.limit
        command = ["nice", "-n", str(NICENESS), sys.executable, "-m", "pytest", "-x", "-q"]
        command += ["-n", "0", "-p", "no:cacheprovider", *tests]
        process = subprocess.Popen(
            command,
            cwd=self.tree,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        try:
            printed, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return ENDLESS, f"more than {limit} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what the tests started
                process.communicate()
        if process.returncode == 0:
            return SURVIVED, ""
        failed = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", printed, re.MULTILINE)
        return FOUND, failed[1] if failed else f"the run ended with code {process.returncode}"


class Results:
    """The file of results. Each is written as soon as it is there.

    Args:
      path: Of the file.
      sources: The text of each file that is broken, to tell results of other sources.
    """

    def __init__(self, path: pathlib.Path, sources: dict[str, str]):
        self.path = path
        text = json.dumps(sorted(sources.items()))
        self.sources = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.sound: dict[str, float] = {}  # seconds of single tests that pass without a fault
        self.results: list[Result] = []
        if path.exists():
            data = json.loads(path.read_text("utf-8"))
            if data["sources"] != self.sources:
                raise app.UsageError(f"{path} is of other sources: name another --output")
            self.sound = data["sound"]
            self.results = [Result(**result) for result in data["results"]]

    def has(self, file: str, mutant: Mutant) -> bool:
        key = (file, mutant.line, mutant.kind, mutant.before, mutant.after)
        return any(key == (r.file, r.line, r.kind, r.before, r.after) for r in self.results)

    def add(self, result: Result) -> None:
        self.results.append(result)
        self.write()

    def write(self) -> None:
        outcomes = collections.Counter(result.outcome for result in self.results)
        seconds = [result.seconds for result in self.results]
        data = {
            "sources": self.sources,
            "outcomes": dict(outcomes),
            "found_share": 1 - outcomes[SURVIVED] / max(1, len(self.results)),
            "mean_seconds": sum(seconds) / max(1, len(seconds)),
            "sound": self.sound,
            "results": [dataclasses.asdict(result) for result in self.results],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(self.path, json.dumps(data, indent=1) + "\n")


def check_sound(copy: Copy, by: str, results: Results) -> None:
    """Raises RuntimeError where the test that found a fault fails without it, too."""
    if by in results.sound or not by.startswith("tests/"):
        return
    start = time.monotonic()
    outcome, _ = copy.test(by, limit=PATIENCE * copy.limit)
    if outcome != SURVIVED:
        raise RuntimeError(f"without a fault {by} fails, too")
    results.sound[by] = round(time.monotonic() - start, 1)
    results.write()


def main(_) -> None:
    files = [f for f in TESTS if any(fnmatch.fnmatch(f, pattern) for pattern in _FILES.value)]
    if not files:
        raise app.UsageError(f"--files names none of the files with tests: {_FILES.value}")
    sources = {file: (ROOT / file).read_text("utf-8") for file in files}
    faults = sample(sources, _COUNT.value, _SEED.value)
    if _SHOW.value:
        for file, mutant in faults:
            change = f"{mutant.before!r} -> {mutant.after!r}"
            sys.stdout.write(f"{file}:{mutant.line} {mutant.kind}: {change}\n")
        return
    results = Results(pathlib.Path(_OUTPUT.value), sources)
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Copy(pathlib.Path(folder), _LIMIT.value)
        for file, mutant in faults:
            if results.has(file, mutant):
                continue
            start = time.monotonic()
            with copy.broken(file, mutant):
                outcome, by = copy.test(*(f"tests/test_{name}.py" for name in TESTS[file]))
            facts = (file, mutant.line, mutant.kind, mutant.before, mutant.after)
            seconds = round(time.monotonic() - start, 1)
            check_sound(copy, by, results)
            results.add(Result(*facts, outcome, seconds, by))
            logging.info("%s:%d %s: %s %s", file, mutant.line, mutant.kind, outcome, by)


if __name__ == "__main__":
    app.run(main)
