"""The doctor on this machine, and on broken ones."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from longlive_kernels import arch, inventory
from longlive_kernels.attention.chunk_table import Table
from longlive_kernels.attention.chunk_table import api as chunk_table
from longlive_kernels.attention.sink_window import api as sink_window
from longlive_kernels.attention.sink_window.call import Call
from longlive_kernels.nvfp4 import NVFP4
from longlive_kernels.nvfp4.matmul import api as matmul_api
from longlive_kernels.nvfp4.quantize import api as quantize_api

import longlive_jax
from longlive_jax import backends, cli, doctor
from longlive_jax.doctor import FAULT, NOTE, OK, WARNING
from longlive_jax.errors import InputError
from longlive_jax.gpus import ARCHITECTURES

NO_CUDA = {name: None for name in doctor.PACKAGES if "cuda" in name}

LAPTOP = doctor.Facts(
    python="3.12.4",
    versions={
        **NO_CUDA,
        **{"jax": "0.11.2", "jaxlib": "0.11.2", "flax": "0.12.8", "numpy": "2.4.6"},
        **{"av": "18.1.0", "torch": "2.13.0"},
    },
    driver=None,
    gpus=(),
    jax_error=None,
    platforms=None,
    platform="cpu",
    devices=("cpu",),
    capability=None,
    memory=16 * 10**9,
    codec=True,
    cache_folder="/home/someone/.cache/longlive-jax/xla",
    cache_writable=True,
    cache_bytes=5 * 10**6,
    disk_free=10**11,
    tiny_error=None,
    tiny_seconds=1.5,
)


def versions(facts, **changed):
    named = {name.replace("_", "-"): version for name, version in changed.items()}
    return facts.versions | named


HOPPER = dataclasses.replace(
    LAPTOP,
    versions=versions(LAPTOP, jax_cuda13_plugin="0.11.2", jax_cuda13_pjrt="0.11.2"),
    driver="580.65.06",
    gpus=("NVIDIA H100 80GB HBM3",),
    platform="gpu",
    devices=("NVIDIA H100 80GB HBM3",) * 2,
    capability="9.0",
    memory=63 * 10**9,
)


def named(facts):
    return {check.name: check for check in doctor.examine(facts)}


@pytest.mark.parametrize("facts", [LAPTOP, HOPPER], ids=["laptop", "hopper"])
def test_nothing_is_wrong_with_a_sound_machine(facts):
    checks = doctor.examine(facts)
    assert {check.state for check in checks} == {OK}
    assert not any(check.mend for check in checks)
    assert doctor.can_generate(checks)


# facts, what differs, the check that notices, how bad it is, the sentence, the command.
BROKEN = {
    "old python": (LAPTOP, {"python": "3.10.2"}, "python", FAULT, "older than 3.11", "venv"),
    "jax does not start": (
        LAPTOP,
        {"jax_error": "jaxlib version 0.13 is newer than and incompatible", "platform": None},
        "jax",
        FAULT,
        "does not start: jaxlib version 0.13",
        "pip install -U 'jax>=0.10.2,<0.13'",
    ),
    "a platform that is not there": (
        LAPTOP,
        {"jax_error": "Unable to initialize backend 'cuda'", "platforms": "cuda"},
        "jax",
        FAULT,
        "backend 'cuda'",
        "env -u JAX_PLATFORMS",
    ),
    "old jax": (
        LAPTOP,
        {"versions": versions(LAPTOP, jax="0.9.1", jaxlib="0.9.1")},
        "jax",
        WARNING,
        "jax 0.9.1 is outside of what is supported",
        "pip install -U 'jax>=0.10.2,<0.13'",
    ),
    "new jax on a GPU": (
        HOPPER,
        {"versions": versions(HOPPER, jax="0.13.0", jaxlib="0.13.0")},
        "jax",
        WARNING,
        "jax 0.13.0 is outside",
        "pip install -U 'jax[cuda13]>=0.10.2,<0.13'",
    ),
    "jaxlib of another time": (
        LAPTOP,
        {"versions": versions(LAPTOP, jaxlib="0.10.2")},
        "jax",
        WARNING,
        "do not belong together",
        "pip install -U",
    ),
    "old flax": (
        LAPTOP,
        {"versions": versions(LAPTOP, flax="0.10.0")},
        "flax",
        WARNING,
        "older than 0.12.8",
        "pip install -U 'flax>=0.12.8'",
    ),
    "no flax": (LAPTOP, {"versions": versions(LAPTOP, flax=None)}, "flax", FAULT, "not", "flax"),
    "no plugin": (
        HOPPER,
        {"versions": LAPTOP.versions, "platform": "cpu"},
        "cuda plugin",
        WARNING,
        "there is a GPU (NVIDIA H100 80GB HBM3), but JAX has no CUDA plugin",
        "pip install 'longlive-jax[cuda]'",
    ),
    "plugin of another version": (
        HOPPER,
        {"versions": versions(HOPPER, jax_cuda13_pjrt="0.10.2")},
        "cuda plugin",
        WARNING,
        "CUDA pjrt 0.10.2 beside jaxlib 0.11.2",
        "pip install -U 'jax[cuda13]==0.11.2'",
    ),
    "CPU beside a GPU": (
        HOPPER,
        {"platform": "cpu", "platforms": "cpu"},
        "device",
        WARNING,
        "runs on the CPU although there is a GPU",
        "env -u JAX_PLATFORMS",
    ),
    "old driver": (
        HOPPER,
        {"driver": "550.54"},
        "driver",
        WARNING,
        "driver 550.54 is too old for CUDA 13, which needs 580",
        "pip install 'jax[cuda12]==0.11.2'",
    ),
    "a GPU that nobody has tried": (
        HOPPER,
        {"capability": "7.5"},
        "architecture",
        WARNING,
        "sm_75 is none of sm_80",
        "longlive bench",
    ),
    "CUDA too old for the GPU": (
        HOPPER,
        {
            "capability": "10.3",
            "versions": versions(LAPTOP, jax_cuda12_plugin="0.11.2", jax_cuda12_pjrt="0.11.2"),
        },
        "architecture",
        WARNING,
        "sm_103 needs CUDA 13",
        "pip install 'jax[cuda13]==0.11.2'",
    ),
    "memory taken": (HOPPER, {"memory": 10**8}, "memory", WARNING, "only 0.1 GB", "nvidia-smi"),
    "memory unknown": (LAPTOP, {"memory": None}, "memory", NOTE, "does not say", ""),
    "no H.264": (LAPTOP, {"codec": False}, "video", FAULT, "cannot write H.264", "pip install"),
    "no PyAV": (
        LAPTOP,
        {"versions": versions(LAPTOP, av=None), "codec": False},
        "video",
        FAULT,
        "PyAV is missing",
        "pip install",
    ),
    "cache read-only": (
        LAPTOP,
        {"cache_writable": False},
        "cache",
        WARNING,
        "every start compiles again",
        "mkdir -p /home/someone/.cache",
    ),
    "disk full": (LAPTOP, {"disk_free": 10**6}, "cache", WARNING, "only 1 MB are free", "rm -r"),
    "no torch": (
        LAPTOP,
        {"versions": versions(LAPTOP, torch=None)},
        "torch",
        NOTE,
        "safetensors can",
        "pip install 'longlive-jax[torch]'",
    ),
    "broken model": (
        LAPTOP,
        {"tiny_error": '"tiny" is no model: vae.safetensors is missing'},
        "tiny model",
        FAULT,
        "vae.safetensors is missing",
        "pip install --force-reinstall",
    ),
}


@pytest.mark.parametrize(
    ("facts", "changed", "name", "state", "found", "mend"), BROKEN.values(), ids=BROKEN
)
def test_a_fault_is_found_and_mended(facts, changed, name, state, found, mend):
    checks = named(dataclasses.replace(facts, **changed))
    check = checks[name]
    assert check.state == state
    assert found in check.found
    assert mend in check.mend and bool(mend) == bool(check.mend)
    assert doctor.can_generate(list(checks.values())) == (state != FAULT)


def longlive(capsys, *arguments):
    code = cli.run(("doctor", *arguments))
    return code, *capsys.readouterr()


def test_this_machine_can_generate(capsys):
    code, out, err = longlive(capsys, "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data["can_generate"]
    assert data["facts"]["versions"]["jax"] == jax.__version__
    assert data["facts"]["platform"] == "cpu"
    assert {check["state"] for check in data["checks"]} <= {OK, NOTE, WARNING}
    assert {row["architecture"] for row in data["architectures"]} == set(ARCHITECTURES)
    assert {row["operation"]: row["chosen"] for row in data["implementations"]} == {
        "attention/sink_window": "xla",
        "attention/chunk_table": "xla",
        "attention/chunk_table, full tables": "xla",
        "matrix products": "xla",
        "nvfp4 W4A4, bf16": "xla",
        "nvfp4 W4A16, bf16": "xla",
        "KV cache": "xla",
        "VAE decode": "xla",
        "text encoder": "xla",
    }


def test_a_broken_machine_is_shown_whole_and_is_code_2(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "probe", lambda: dataclasses.replace(LAPTOP, codec=False))
    code, out, err = longlive(capsys)
    assert code == 2
    assert "pip install --force-reinstall --only-binary :all: av" in out
    for word in ("tiny model", "sm_120", "attention", "nvfp4"):
        assert word in out
    assert err.startswith("longlive: nothing can be generated here yet: PyAV 18.1.0 cannot write")
    assert err.count("\n") == 1


def test_a_model_that_does_not_load_is_noticed(monkeypatch):
    def broken(name):
        raise InputError(f'"{name}" is no model')

    monkeypatch.setattr(longlive_jax, "load", broken)
    assert doctor._tiny() == (0.0, '"tiny" is no model')


def test_jax_without_its_backend_is_noticed(monkeypatch):
    def broken():
        raise RuntimeError("Unable to initialize backend 'cuda'\nand more")

    monkeypatch.setattr(jax, "devices", broken)
    error, runtime = doctor._runtime()
    assert error == "Unable to initialize backend 'cuda'"
    assert runtime["platform"] is None


def test_a_codec_that_is_missing_is_noticed(monkeypatch):
    assert doctor._codec()
    monkeypatch.setattr(doctor, "CODEC", "libx999")
    assert not doctor._codec()


@pytest.mark.parametrize("said", ["580.65.06, NVIDIA H100 80GB HBM3\n" * 2, "", None])
def test_the_driver_is_asked(tmp_path, monkeypatch, said):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{said}'\n" if said is not None else "#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(tool))
    found = ("580.65.06", ("NVIDIA H100 80GB HBM3",) * 2) if said else (None, ())
    assert doctor._driver() == found


def test_the_cache_folder_is_measured(tmp_path):
    (tmp_path / "xla").mkdir()
    (tmp_path / "xla" / "program").write_bytes(b"x" * 1000)
    assert doctor._size(tmp_path) == 1000
    assert doctor._writable(tmp_path / "not" / "there" / "yet")
    assert not doctor._writable(tmp_path / "xla" / "program")
    assert not doctor._writable(doctor.pathlib.Path("/proc/longlive"))


def test_every_operation_says_why_not():
    for facts in (LAPTOP, HOPPER):
        for row in backends.table(facts.platform, facts.architecture):
            assert row["chosen"] != "nothing"
    rows = backends.table(None, None)
    assert {row["chosen"] for row in rows} == {"nothing"}
    assert all("JAX does not start" in row["why not the others"] for row in rows)


def test_a_kernel_is_chosen_only_where_it_runs_and_is_not_opt_in(monkeypatch):
    kernel = backends.Backend("attention/sink_window", "fast", ("sm_90",))
    assert kernel.why_not("cpu", None) == "needs a GPU of sm_90"
    assert kernel.why_not("gpu", "sm_89") == "needs sm_90; this is sm_89"
    assert kernel.why_not("gpu", "sm_90") == ""
    unproven = dataclasses.replace(kernel, opt_in="simulated")
    assert unproven.why_not("gpu", "sm_90") == "opt-in: simulated"
    monkeypatch.setattr(backends, "BACKENDS", (kernel, *backends.BACKENDS))
    assert backends.table("gpu", "sm_90")[0]["chosen"] == "fast"
    assert backends.table("cpu", None)[0]["chosen"] == "xla"


def test_precisions_tell_models_from_hardware():
    here = {row["precision"]: row for row in backends.precisions("gpu", "sm_90")}
    assert here["bf16"]["models"] == "runs: the default on accelerators"
    assert here["fp8"] == {
        "precision": "fp8",
        "models": "runs: --precision fp8, --kv fp8",
        "hardware": "in its tensor cores",
    }
    assert here["nvfp4"]["hardware"] == backends.EMULATED
    assert {row["models"] for row in backends.precisions(None, None)} == {"JAX does not start"}


README = pathlib.Path(__file__).parents[1] / "kernels" / "README.md"


def test_the_inventory_is_that_of_the_readme():
    entries = (*inventory.ATTENTION, *inventory.LOW_BIT)
    ops = {entry.op for entry in entries}
    lines = [line for line in README.read_text().splitlines() if line.startswith("| `")]
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    shown = [row for row in rows if row[0].split(",")[0].strip("`") in ops]
    assert shown == [entry.row for entry in entries]


def test_the_inventory_has_every_backend_where_it_runs():
    """What it says of architectures is what the backends say themselves."""
    for op, module in (("nvfp4/matmul", matmul_api), ("nvfp4/quantize", quantize_api)):
        entries = [entry for entry in inventory.LOW_BIT if entry.op == op]
        assert {entry.backend for entry in entries} == set(module.BACKENDS)
        assert next(iter(module.BACKENDS)) in {e.backend for e in entries if not e.opt_in}
    four = NVFP4(jnp.zeros((128, 128), "uint8"), jnp.zeros((128, 16), "float8_e4m3fn"), 0.0, "mse")
    operands = {"W4A4": four, "W4A16": jnp.zeros((128, 256), jnp.bfloat16)}
    for entry in inventory.LOW_BIT:
        if not entry.calls:
            continue
        for name in ARCHITECTURES:
            call = operands[entry.calls], four, jnp.bfloat16
            reason = matmul_api.BACKENDS[entry.backend].unsupported(*call, sm=int(name[3:]))
            runs = reason is None or "jax_triton" in reason  # which is not installed everywhere
            assert runs == (name in entry.architectures), (entry.backend, name, reason)


def test_the_inventory_has_every_architecture_of_attention():
    """What it says is what the backends say themselves."""
    x, table = jnp.zeros((1, 16, 1, 128), jnp.bfloat16), Table.of(np.ones((2, 2), bool))
    slots = jnp.zeros((1, 2, 8, 1, 128), jnp.bfloat16)
    call = Call(x, slots, slots, jnp.ones((1, 2, 2), bool), None, None, None)
    plain = {"xla", "reference"}  # which run everywhere
    ours = {
        (inventory.CHUNKS, name): (chunk_table.BACKENDS[name], (x, x, x, table))
        for name in chunk_table.BACKENDS.keys() - plain
    } | {
        (inventory.WINDOW, name): (sink_window.BACKENDS[name], (call,))
        for name in sink_window.BACKENDS.keys() - plain
    }
    listed = {(e.op, e.backend) for e in inventory.ATTENTION}
    assert ours.keys() == {(op, name) for op, name in listed if name not in plain}
    for (op, name), (backend, given) in ours.items():
        entries = [e for e in inventory.ATTENTION if (e.op, e.backend) == (op, name)]
        reasons = {arch: backend.unsupported(*given, sm=int(arch[3:])) for arch in ARCHITECTURES}
        runs = {
            arch
            for arch, reason in reasons.items()
            if reason is None or "needs tokamax" in reason  # which is not installed everywhere
        }
        assert runs == {arch for e in entries for arch in e.architectures}, (name, reasons)


@pytest.mark.parametrize("sm", [None, 75, *(int(name[3:]) for name in ARCHITECTURES)])
def test_the_doctor_names_the_default_that_runs(monkeypatch, sm):
    """What it reads from the inventory is what the ops choose."""
    monkeypatch.setattr(arch, "default", lambda: sm)
    x, full = jnp.zeros((1, 16, 1, 128), jnp.bfloat16), Table.of(np.ones((2, 2), bool))
    slots = jnp.zeros((1, 2, 8, 1, 128), jnp.bfloat16)
    call = Call(x, slots, slots, jnp.ones((1, 1, 2), bool), None, None, None)
    causal = Table.of(np.tril(np.ones((2, 2), bool)))
    found = {
        inventory.WINDOW: first(sink_window, call),
        inventory.CHUNKS: first(chunk_table, x, x, x, causal),
        f"{inventory.CHUNKS}, {inventory.FULL}": first(chunk_table, x, x, x, full),
    }
    here = ("cpu", None) if sm is None else ("gpu", f"sm_{sm}")
    rows = {row["operation"]: row["chosen"] for row in backends.table(*here)}
    assert {op: rows[op] for op in found} == found
    assert found[inventory.WINDOW] == ("cudnn" if sm is not None and sm >= 80 else "xla")


def first(api, *call) -> str:
    return next(n for n, backend in api.BACKENDS.items() if backend.unsupported(*call) is None)


def test_every_architecture_is_told_how_low_bits_run():
    rows = {row["on"].split()[0]: row for row in backends.low_bits()}
    assert list(rows) == ["CPU", *ARCHITECTURES]
    assert rows["CPU"]["W4A4"] == "emulated (xla), run on device"
    for name in ("sm_80", "sm_89", "sm_90"):
        assert "units refused" in rows[name]["W4A4"]
    assert "by name: wgmma simulated" in rows["sm_90"]["W4A16"]
    assert "mosaic compiled only, cudnn compiled only" in rows["sm_100"]["W4A4"]
    assert "mosaic" not in rows["sm_120"]["W4A4"]
    assert rows["sm_80"]["fp8 products"] == "emulated, compiled only"
    assert rows["sm_89"]["fp8 products"] == "in its units, compiled only"


def test_emulation_is_told_on_gpus():
    assert backends.emulation("cpu", None) == ""
    hopper = backends.emulation("gpu", "sm_90")
    assert "emulated on sm_90, which has no FP4 units" in hopper and "--weights_only" in hopper
    assert "whose FP4 units no default uses yet" in backends.emulation("gpu", "sm_100")


def test_the_doctor_comes_without_jax():
    """It must be able to say that JAX is broken: a JAX that raises when imported."""
    script = (
        "import sys; sys.modules['jax'] = None; "
        "from longlive_jax import cli; sys.exit(cli.run(['doctor', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 2, done.stderr
    data = json.loads(done.stdout)
    assert not data["can_generate"]
    assert data["checks"][1]["state"] == FAULT
    assert "Traceback" not in done.stderr
