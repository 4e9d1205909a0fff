"""`experiments/gpu_check.py`: a whole run where only a GPU image's packages are installed, what
becomes of parts that hang or die, and that wrong results are found.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import sysconfig
import time
import types
import venv

import gpu_check
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_check import Part
from gpu_checks import attention, child, memory, model, toy
from longlive_kernels.attention.chunk_table import api as chunk_table
from longlive_kernels.attention.sink_window import api as sink_window

from longlive_jax import bench_ops, plan

ROOT = pathlib.Path(gpu_check.__file__).parents[1]
# Import names and distributions that an image with JAX for GPUs lacks, this project among them.
MISSING = ("av", "grain", "beartype", "ml_collections", "tokamax", "jax_triton", "triton")
OWN = ("longlive", "__editable__")

PROGRAM = """
import json, os, signal, subprocess, sys, time
path, *entries = sys.argv[1:]
def say(entry, **facts):
    with open(path, "a") as file:
        file.write(json.dumps({"entry": entry, **facts}) + "\\n")
for entry in entries:
    say(entry, state="begun")
    if entry == "hangs":
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"])
        print("sleeper", sleeper.pid, flush=True)
        time.sleep(900)
    if entry == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if entry == "loses the device":
        say(entry, state="failed", why="illegal address")
        sys.exit("the device is lost")
    say(entry, state="ok", kind="A Card (TM)", platform="gpu", process=os.getpid())
"""


def stand_in(*entries: str, name: str = "stand-in", **choices) -> Part:
    """A part that does what its entries are called."""
    limits = dict(limit_s=120.0, silence_s=8.0) | choices
    return Part(name, (sys.executable, "-c", PROGRAM), entries, **limits)


def run(part: Part, folder: pathlib.Path, budget_s: float = 120.0) -> tuple[dict, list[str]]:
    """Its summary, and all of them as they were on the way."""
    seen = []
    summary = gpu_check.run_part(
        part, time.monotonic() + budget_s, folder, lambda x: seen.append(json.dumps(x))
    )
    return summary, seen


def states(summary: dict) -> dict[str, str]:
    return {name: entry["state"] for name, entry in summary["entries"].items()}


def gone(process: int) -> bool:
    """Whether a process has ended; one that nobody has waited for has, too."""
    try:
        return "\nState:\tZ" in pathlib.Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True


def test_what_hangs_or_dies_costs_one_entry(tmp_path):
    part = stand_in("one", "hangs", "two", "is killed", "loses the device", "three")
    summary, seen = run(part, tmp_path)
    assert states(summary) == {
        **dict.fromkeys(("one", "two", "three"), "ok"),
        **dict.fromkeys(("is killed", "loses the device"), "failed"),
        "hangs": "timed out",
    }
    assert summary["state"] == "failed"
    entries = summary["entries"]
    assert entries["hangs"]["why"] == "nothing came for 8 s"
    assert entries["is killed"]["why"] == "it ended with status -9"
    assert entries["loses the device"]["why"] == "illegal address"
    # One process goes on as long as it can.
    assert len({entries[name]["process"] for name in ("one", "two", "three")}) == 3
    _, sleeper = entries["hangs"]["output"].split()
    deadline = time.monotonic() + 10
    while not gone(int(sleeper)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gone(int(sleeper))
    assert any('"one": {"state": "ok"' in x and '"three": {"state": "not' in x for x in seen)


def test_the_time_of_a_part_and_of_the_run_ends(tmp_path):
    summary, _ = run(stand_in("one", "hangs", "two", limit_s=7.0, silence_s=60.0), tmp_path)
    assert states(summary) == {"one": "ok", "hangs": "timed out", "two": "not reached"}
    assert summary["entries"]["hangs"]["why"] == "the time of its part was up"
    assert summary["state"] == "timed out" and summary["took_s"] < 30
    summary, _ = run(stand_in("one"), tmp_path, budget_s=gpu_check.LEAST_S - 1)
    assert states(summary) == {"one": "not reached"} and summary["state"] == "not reached"


def test_a_program_that_does_not_start_has_failed_and_says_why(tmp_path):
    command = (sys.executable, "-c", f"raise OSError('no {ROOT}/weights')")
    summary, _ = run(Part("x", command, ("one", "two"), 60.0, 60.0), tmp_path)
    assert states(summary) == {"one": "failed", "two": "failed"}
    output = summary["entries"]["two"]["output"]
    assert output.endswith("OSError: no ./weights") and str(ROOT) not in output


@pytest.fixture
def two_parts(monkeypatch):
    """A device at once, then a part that dies and one that does not."""
    monkeypatch.setattr(gpu_check, "DEVICE", stand_in("facts", name="device"))
    listed = [
        stand_in("is killed", name="one"),
        stand_in("hangs", name="two", silence_s=3.0),
        stand_in("fine", name="three"),
        stand_in("fine", name="four x"),
        Part("five", (), (), 0.0, 0.0, unfit="needs a GPU"),
    ]
    monkeypatch.setattr(gpu_check, "parts", lambda *_: listed)


def test_the_rest_goes_on_and_the_report_has_a_name(two_parts, monkeypatch, tmp_path):
    free_name = gpu_check.free_name
    monkeypatch.setattr(gpu_check, "free_name", lambda *x: free_name(*x, tmp_path / "devices"))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "one,two,three,five"])
    assert gpu_check.main() == 1
    (path,) = (tmp_path / "devices").iterdir()
    report = json.loads(path.read_text())
    assert path.name == f"a-card-tm-{report['started'][:10]}.json"
    found = {name: part["state"] for name, part in report["parts"].items()}
    assert found == {
        "device": "ok",
        "one": "failed",
        "two": "timed out",
        "three": "ok",
        "four x": "skipped",
        "five": "skipped",
    }
    assert report["parts"]["four x"]["why"] == "--only"
    assert report["parts"]["five"]["why"] == "needs a GPU"
    assert report["complete"] and report["left_out"] == {}


def test_names_of_reports_are_not_taken_twice(tmp_path):
    first = gpu_check.free_name("NVIDIA H100 80GB HBM3", "2026-12-01", tmp_path)
    assert first.name == "nvidia-h100-80gb-hbm3-2026-12-01.json"
    first.touch()
    second = gpu_check.free_name("NVIDIA H100 80GB HBM3", "2026-12-01", tmp_path)
    assert second.name == "nvidia-h100-80gb-hbm3-2026-12-01-2.json"


MAIN = """
import gpu_check, sys, test_gpu_check
gpu_check.DEVICE = test_gpu_check.stand_in("facts", name="device")
hanging = test_gpu_check.stand_in("one", "hangs", "two", silence_s=600.0)
gpu_check.parts = lambda *_: [hanging, test_gpu_check.stand_in("fine", name="last")]
sys.exit(gpu_check.main())
"""


def hanging(path: pathlib.Path) -> bool:
    """Whether the report says that the entry which hangs is being measured."""
    part = json.loads(path.read_text())["parts"].get("stand-in") if path.exists() else None
    return part is not None and states(part)["hangs"] == "begun"


def test_an_interrupt_loses_nothing(tmp_path):
    path = tmp_path / "report.json"
    folders = (ROOT / "experiments", ROOT / "tests", *filter(None, sys.path))
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "--json", str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not hanging(path):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    report = json.loads(path.read_text())
    assert list(report["parts"]) == ["device", "stand-in"] and not report["complete"]
    part = report["parts"]["stand-in"]
    assert states(part) == {"one": "ok", "hangs": "interrupted", "two": "not reached"}
    assert part["state"] == "interrupted"
    assert gone(part["entries"]["one"]["process"])
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("flags", "message"), [(("--only", "speed"), "--only knows"), (("--seconds", "0"), "more than")]
)
def test_bad_flags_are_a_sentence(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *flags])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert message in capsys.readouterr().err


def test_a_gpu_gets_the_presets_in_order_of_worth(tmp_path):
    listed = gpu_check.parts({"kind": "NVIDIA H100 80GB HBM3", "platform": "gpu"}, False, tmp_path)
    assert [part.name for part in listed] == [
        *(f"attention {name}" for name in gpu_check.BACKENDS),
        *("bench wan21_1_3b", "bench wan22_5b", "memory", "toy CPU", "toy device"),
        *(f"training {name}" for name in gpu_check.BACKENDS),
        "memory compiled",
    ]
    assert not any(part.unfit for part in listed)
    for part in listed:
        known = {name.split()[-1] for name in plan.PRESETS}
        if part.name.startswith("bench"):
            assert part.arguments[0] in known
        if part.name.split()[0] in ("attention", "training"):
            for entry in part.entries:
                op, shape = entry.split(" @ ")
                assert shape in bench_ops.OPS[op].shapes and not shape.startswith("tiny")
        if part.name.startswith("memory"):
            assert {entry.split(", ")[0] for entry in part.entries} <= known
    on_cpu = gpu_check.parts({"kind": "cpu", "platform": "cpu"}, True, tmp_path)
    assert {part.name for part in on_cpu if part.unfit} == {
        f"{word} {name}"
        for word in ("attention", "training")
        for name in gpu_check.BACKENDS
        if name != "xla"
    }


def test_every_backend_of_attention_is_measured():
    named = set(sink_window.BACKENDS) | set(chunk_table.BACKENDS)
    assert named == {*gpu_check.BACKENDS, "reference"}


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_part_reports_what_became_of_each_entry(tmp_path):
    def measure(entry):
        if entry == "skipped":
            raise child.Skipped("no such backend")
        if entry == "wrong":
            raise child.Wrong("too far", {"error": float("nan")})
        if entry == "raises":
            raise ValueError("two\nlines")
        return {"ms": {"min": float("inf")}, "numbers": (1, 2.5)}

    names = ("fine", "skipped", "wrong", "raises", "fine")
    child.each(tmp_path / "results", names, measure)
    begun, ended = lines(tmp_path / "results")[::2], lines(tmp_path / "results")[1::2]
    assert begun == [{"entry": name, "state": "begun"} for name in names]
    fine = {"entry": "fine", "state": "ok", "ms": {"min": "inf"}, "numbers": [1, 2.5]}
    assert ended == [
        fine,
        {"entry": "skipped", "state": "skipped", "why": "no such backend"},
        {"entry": "wrong", "state": "failed", "why": "too far", "error": "nan"},
        {"entry": "raises", "state": "failed", "why": "ValueError: two\nlines"},
        fine,
    ]


def test_a_part_ends_where_the_device_is_lost(tmp_path, monkeypatch):
    def lost(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: an illegal memory access")

    def measure(entry):
        monkeypatch.setattr(jax, "block_until_ready", lost)
        raise jax.errors.JaxRuntimeError("INTERNAL: an illegal memory access")

    with pytest.raises(SystemExit, match="the device is lost"):
        child.each(tmp_path / "results", ("one", "two"), measure)
    assert [line["state"] for line in lines(tmp_path / "results")] == ["begun", "failed"]


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(attention, "SAMPLES", 1)
    monkeypatch.setattr(attention, "SAMPLE_S", 0.0)


CALLS = [
    *(f"attention/sink_window{kind} @ tiny_chunk" for kind in ("", " int8", " fp8", " nvfp4")),
    "attention/sink_window @ frames_differ",
    "attention/sink_window gradient @ sinks",
    "attention/chunk_table @ no_keys",
    "attention/chunk_table gradient @ tiny_12",
]


@pytest.mark.parametrize("call", CALLS)
def test_the_reference_agrees_with_itself_head_by_head(call, brief):
    """What is left are roundings to bfloat16."""
    facts = attention.measure("reference", call)
    assert facts["against"] == "reference in float32" and facts["repeats_to_the_bit"]
    assert 0 < facts["error"] <= 2**-8
    assert len(facts["gradient_errors"]) == 3 * ("gradient" in call)
    assert all(x <= 2**-7 for x in facts["gradient_errors"])
    assert facts["ms"]["min"] <= facts["ms"]["median"] <= facts["ms"]["max"]
    assert facts["tflops"] > 0 and not facts["default"]


def test_expected_results_of_large_calls_come_from_xla_for_two_heads(brief, monkeypatch):
    monkeypatch.setattr(attention.report, "free_memory", lambda: 1 << 30)
    monkeypatch.setattr(attention, "SCORES", 1 << 20)
    monkeypatch.setattr(attention, "ALL_HEADS", 0.0)
    monkeypatch.setattr(attention.report, "check_room", lambda program: 0)
    facts = attention.measure("xla", "attention/chunk_table @ tiny_12")
    assert facts["against"] == "xla in float32" and facts["heads_compared"] == 2


def spoilt(change):
    """A backend whose results are changed."""
    return types.SimpleNamespace(
        unsupported=lambda *_: None,
        attend=lambda *x: change(chunk_table.BACKENDS["xla"].attend(*x)),
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.at[:, :, -1, 3].multiply(1.25),  # of the last head one channel
        lambda x: x.at[0, 5, 0, 0].set(jnp.nan),
        lambda x: x.at[0, 5, 0, 0].set(jnp.inf),
        lambda x: jnp.roll(x, 1, axis=1),
    ],
)
def test_wrong_results_are_found(change, brief, monkeypatch):
    monkeypatch.setitem(chunk_table.BACKENDS, "spoilt", spoilt(change))
    with pytest.raises(child.Wrong, match="too far from reference") as error:
        attention.measure("spoilt", "attention/chunk_table @ tiny_12")
    assert not error.value.facts["error"] <= 2**-7
    assert error.value.facts["ms"]["median"] > 0


def test_wrong_gradients_are_found(brief, monkeypatch):
    @jax.custom_vjp
    def doubled(x):
        return x

    doubled.defvjp(lambda x: (x, None), lambda _, grad: (2 * grad,))
    monkeypatch.setitem(chunk_table.BACKENDS, "spoilt", spoilt(doubled))
    with pytest.raises(child.Wrong) as error:
        attention.measure("spoilt", "attention/chunk_table gradient @ tiny_12")
    assert error.value.facts["error"] <= 2**-7
    assert min(error.value.facts["gradient_errors"]) > 0.9


def test_results_that_change_from_call_to_call_are_noted():
    x = jnp.array([0.0, 1.0, jnp.nan], jnp.bfloat16)
    assert attention._same((x, x), (x, x))
    assert not attention._same(x, jnp.array([-0.0, 1.0, jnp.nan], jnp.bfloat16))


def test_raw_frames_are_all_written(tmp_path):
    frames = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    with model.RawWriter(tmp_path / "x.mp4", 16) as writer:
        writer.write(frames)
        writer.write(frames[:, ::-1])
    assert (tmp_path / "x.mp4").read_bytes() == frames.tobytes() + frames[:, ::-1].tobytes()


def test_frames_that_differ_are_found(tmp_path):
    chunks = [np.full((3, 4, 4, 3), 100, np.uint8)] * 2
    files = [tmp_path / name for name in ("mine.npz", "theirs.npz")]
    np.savez(files[0], *chunks)
    with pytest.raises(child.Skipped, match="theirs.npz"):
        toy.measure(*files, "difference")
    chunks[1] = chunks[1].copy()
    chunks[1][0, 0, 0, 0] = 97
    np.savez(files[1], *chunks)
    facts = toy.measure(*files, "difference")
    assert facts["largest"] == [0, 3] and facts["mean"] == [0.0, 3 / 144]
    np.savez(files[1], chunks[0], np.full((3, 4, 4, 3), 90, np.uint8))
    with pytest.raises(child.Wrong, match="differ"):
        toy.measure(*files, "difference")


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GB200", "b200"),
        ("Tesla T4", "h100"),
        ("", "h100"),
    ],
)
def test_plans_are_for_the_device(device, gpu):
    assert memory._gpu(device) == gpu


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> pathlib.Path:
    """An interpreter with what an image with JAX has: without some packages and this project."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    target = folder / "lib" / version / "site-packages"
    for kind in ("purelib", "platlib"):
        for path in pathlib.Path(sysconfig.get_path(kind)).iterdir():
            name = path.name.lower().split("-")[0].split(".")[0]
            if name in MISSING or path.name.lower().startswith(OWN):
                continue
            if not (target / path.name).exists():
                (target / path.name).symlink_to(path)
    return python


def in_bare(python: pathlib.Path, *arguments: str, **choices) -> subprocess.CompletedProcess:
    hidden = ("PYTHONPATH", "XLA_FLAGS", "PYTHONHOME")
    environment = {name: x for name, x in os.environ.items() if name not in hidden}
    return subprocess.run(
        [str(python), *arguments],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        **choices,
    )


@pytest.mark.slow
def test_a_run_on_a_cpu_needs_no_more_than_an_image_with_jax_has(bare_python, tmp_path):
    for name in (*MISSING, "longlive_jax", "longlive_kernels"):
        assert in_bare(bare_python, "-c", f"import {name}", cwd=tmp_path).returncode == 1
    script, path = ROOT / "experiments" / "gpu_check.py", tmp_path / "cpu.json"
    done = in_bare(bare_python, str(script), "--json", str(path), cwd=tmp_path)
    report = json.loads(path.read_text())
    assert done.returncode == 0, json.dumps(report, indent=1) + done.stderr
    assert done.stdout == "" and done.stderr.splitlines()[-1] == str(path)
    assert list(report) == [
        *("schema", "started", "budget_s", "took_s", "complete", "left_out", "parts")
    ]
    assert report["schema"] == 1 and report["complete"]
    assert set(report["left_out"]) == {"wan21_1_3b", "wan22_5b", "optimisations"}
    assert "there is no GPU" in report["left_out"]["wan22_5b"]
    check_parts(report["parts"])
    assert str(ROOT) not in path.read_text()


def check_parts(parts: dict) -> None:
    assert list(parts) == [
        "device",
        *(f"attention {name}" for name in gpu_check.BACKENDS),
        *("bench tiny", "memory", "toy CPU", "toy device"),
        *(f"training {name}" for name in gpu_check.BACKENDS),
    ]
    skipped = {name for name, part in parts.items() if part["state"] == "skipped"}
    assert skipped == {
        f"{x} {y}" for x in ("attention", "training") for y in gpu_check.BACKENDS[:3]
    }
    facts = parts["device"]["entries"]["facts"]
    assert facts["platform"] == "cpu" and facts["packages"]["jax"] == jax.__version__
    assert "av" not in facts["packages"] and len(facts["kernels_sha256"]) == 64
    assert parts["device"]["entries"]["peaks"]["flops"]["bfloat16"] > 0
    measured = parts["attention xla"]["entries"] | parts["training xla"]["entries"]
    assert len(measured) == 8
    for entry in measured.values():
        assert entry["state"] == "ok" and entry["default"] and entry["error"] <= 2**-7
        assert entry["heads_compared"] == 8 and entry["ms"]["median"] > 0
    bench = parts["bench tiny"]["entries"]
    assert [x["state"] for x in bench.values()] == ["ok", "skipped", "ok"]
    best = bench["best"]
    assert best["video"] == "raw frames: PyAV is missing"
    assert best["report"]["denoise_fps"] > 0 and "av" not in best["report"]["versions"]
    assert bench["best, switch"]["report"]["switches"]
    (planned,) = parts["memory"]["entries"].values()
    assert planned["plan"]["source"] == "formula"
    assert planned["measured_bytes"] == best["report"]["peak_memory_bytes"]
    assert planned["of_expected"] == planned["measured_bytes"] / planned["expected_bytes"]
    difference = parts["toy device"]["entries"]["difference"]
    assert difference["largest"] == [0] * 2 * toy.CHUNKS  # of a CPU and the same CPU
