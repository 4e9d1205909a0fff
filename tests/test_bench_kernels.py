"""The report of kernels: counts worked out by hand, the check of defaults, small runs."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import longlive_kernels
import numpy as np
import pytest
from longlive_kernels.attention.chunk_table import api as chunk_table
from longlive_kernels.attention.sink_window import api as sink_window
from longlive_kernels.nvfp4.matmul import api as products
from longlive_kernels.nvfp4.quantize import api as quantiser
from rich.console import Console
from test_report import HEAD

from longlive_jax import bench_compile, bench_kernels, bench_ops, cli
from longlive_jax.bench_kernels import Default, Effort, Row, Unrun
from longlive_jax.bench_ops import OPS, Case
from longlive_jax.errors import InputError

LITTLE = Effort(side=128, copied=1 << 20, budget_s=1e9, sample_s=0.0, queued=False)
KEY = jax.random.key(0)
SMALL = {  # of each op one shape that compiles in a moment
    "attention/chunk_table": "one_frame",
    "attention/chunk_table gradient": "one_frame",
    "attention/sink_window": "one_slot",
    "attention/sink_window gradient": "one_slot",
    **{f"attention/sink_window {kind}": "one_slot" for kind in bench_ops.SLOTS},
    "nvfp4/quantize": "one_tile",
    "nvfp4/matmul": "one_block",
    "nvfp4/matmul_w4a16": "one_block",
    "nvfp4/linear": "one_block",
    "nvfp4/linear gradient": "one_block",
}


def case(op, shape, dtype=jnp.float32):
    return OPS[op].case(OPS[op].shapes[shape], jnp.dtype(dtype))


@pytest.fixture
def quick(monkeypatch):
    """No large product, no compiler for GPUs, one shape of each op."""
    monkeypatch.setattr(bench_kernels, "CPU", LITTLE)
    monkeypatch.setattr(bench_compile, "missing", lambda: "no compiler")

    def only(op):
        return dataclasses.replace(op, fits=lambda name, shape: name == SMALL[op.name])

    monkeypatch.setattr(bench_kernels, "OPS", {name: only(op) for name, op in OPS.items()})


def test_every_op_of_the_package_is_in_the_table():
    folders = {
        op.package.removeprefix("longlive_kernels.").replace(".", "/") for op in OPS.values()
    }
    root = pathlib.Path(longlive_kernels.__path__[0])
    assert folders == {str(path.parent.relative_to(root)) for path in root.rglob("shapes.py")}
    assert set(SMALL) == set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_cases_can_be_traced_for_the_backend_that_is_picked(name):
    op = OPS[name]
    made = case(name, SMALL[name])
    able = [backend for backend in op.backends.values() if made.refusal(backend) is None]
    out = jax.eval_shape(lambda *x: made.call(able[0], *x), *made.abstract())
    assert jax.tree.leaves(out)


def test_flops_and_bytes_are_those_of_the_op():
    product = case("nvfp4/matmul", "odd_rows")  # 37 x 80 times 48 x 80 transposed, float32 out
    assert product.flops == 2 * 37 * 48 * 80
    packed = (37 + 48) * 80 * (4 + 8 / 16) / 8
    assert product.nbytes == packed + 37 * 48 * 4
    mixed = case("nvfp4/matmul_w4a16", "odd_rows", jnp.bfloat16)
    assert mixed.nbytes == 37 * 80 * 2 + 48 * 80 * 9 / 16 + 37 * 48 * 2
    rows = case("nvfp4/quantize", "odd_rows", jnp.bfloat16)
    assert (rows.flops, rows.nbytes) == (0, 37 * 80 * (2 + 9 / 16))
    layer = case("nvfp4/linear gradient", "odd_rows")
    assert layer.flops == 3 * product.flops
    assert layer.nbytes == 2 * (37 * 80 + 48 * 80 + 37 * 48) * 4
    attention = case("attention/chunk_table", "fewer_queries")  # of 14 frames the last 5
    pairs = (12 + 12 + 12 + 14 + 14) * 16**2
    assert attention.flops == 4 * 8 * 32 * pairs
    assert case("attention/chunk_table gradient", "fewer_queries").flops == 3.5 * attention.flops
    window = case("attention/sink_window", "ragged")  # 2 frames of 11 tokens see 4 slots
    assert window.flops == 4 * 2 * 64 * 22 * 44
    assert window.nbytes == 2 * (22 + 44) * 2 * 64 * 4
    gradient = case("attention/sink_window gradient", "ragged")  # 2 of the 4 slots are its own
    assert gradient.flops == 3 * window.flops
    assert gradient.nbytes == window.nbytes + 2 * (22 + 22) * 2 * 64 * 4
    # Its own as they are, the other 2 in fewer bits, with scales.
    for kind, each in {"fp8 scores": 1 + 4 / 64, "int8": 1 + 4 / 64, "nvfp4": 9 / 16}.items():
        low = case(f"attention/sink_window {kind}", "ragged")
        assert low.nbytes == 2 * (44 * 4 + 22 * each) * 2 * 64 and low.flops == window.flops


def test_products_of_nvfp4_say_what_their_operands_say():
    """What is drawn as four bits is a matrix that the format knows."""
    made = case("nvfp4/matmul", "odd_rows")
    a, b = made.make(KEY)
    ours = made.call(products.BACKENDS["reference"], a, b)
    theirs = quantiser.dequantize(a) @ quantiser.dequantize(b).T
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert float(jnp.abs(theirs).max()) > 0


@pytest.mark.parametrize("name", [name for name in OPS if name.startswith("attention")])
def test_backends_of_a_case_agree(name):
    # Of these, that are not done at once as the reference does it.
    shape = "sinks" if "sink_window" in name else "last_chunk_short"
    made, backends = case(name, shape), OPS[name].backends
    results = [
        made.call(backend, *made.make(KEY))
        for backend in backends.values()
        if made.refusal(backend) is None
    ]
    assert len(results) > 1
    for other in results[1:]:
        for ours, theirs in zip(*map(jax.tree.leaves, (results[0], other)), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in OPS if name.endswith("gradient")])
def test_gradients_are_timed_with_the_output(name):
    """As training has both; XLA leaves out what is thrown away."""
    made, ahead = (case(op, SMALL[name]) for op in (name, name.removesuffix(" gradient")))
    backend = next(x for x in OPS[name].backends.values() if made.refusal(x) is None)
    out, gradient = jax.eval_shape(lambda *x: made.call(backend, *x), *made.abstract())
    assert out.shape == jax.eval_shape(lambda *x: ahead.call(backend, *x), *ahead.abstract()).shape
    assert len(jax.tree.leaves(gradient)) > 1


def test_what_is_seen_is_an_operand():
    made, backend = case("attention/sink_window", "sinks"), sink_window.BACKENDS["xla"]
    new, memory, (visible, layer, slots), turns = made.make(KEY)
    others = (jnp.roll(visible, 1, 2), layer, slots), (visible, layer - 1, slots)
    first = made.call(backend, new, memory, (visible, layer, slots), turns)
    for places in others:
        assert jnp.abs(made.call(backend, new, memory, places, turns) - first).max() > 0.1


@pytest.mark.parametrize(
    ("name", "api"),
    [
        ("attention/chunk_table", chunk_table),
        ("attention/sink_window", sink_window),
        ("nvfp4/quantize", quantiser),
        ("nvfp4/matmul", products),
        ("nvfp4/matmul_w4a16", products),
    ],
)
def test_the_default_is_the_first_that_supports_a_call(monkeypatch, name, api):
    """Which is what the check of defaults takes for granted."""
    picked, made = [], case(name, SMALL[name])
    for backend in api.BACKENDS.values():
        inner = backend.unsupported
        monkeypatch.setattr(backend, "unsupported", _noting(picked, backend, inner))
    jax.eval_shape(lambda *x: _public(name, *x), *made.abstract())
    first = next(b for b in api.BACKENDS.values() if made.refusal(b) is None)
    assert next(b for b, why in picked if why is None) is first


def _noting(picked, backend, inner):
    def unsupported(*args, **options):
        why = inner(*args, **options)
        picked.append((backend, why))
        return why

    return unsupported


def _public(name, *x):
    """The function that users call, on a case's operands, with no backend named."""
    shape = OPS[name].shapes[SMALL[name]]
    if name == "attention/chunk_table":
        return chunk_table.chunk_table(*x, shape.table)
    if name == "attention/sink_window":
        (q,), (k, v), (visible, layer, _), _ = x
        return sink_window.sink_window(q, k, v, visible, layer=layer)
    if name == "nvfp4/quantize":
        return quantiser.quantize(x[0], rule="mse", tile=shape.tile, transpose=shape.transpose)
    function = products.matmul if name == "nvfp4/matmul" else products.matmul_w4a16
    return function(*x)


def rows(**seconds):
    """Rows of one op and shape; None where a backend did not run."""
    one = dict(op="op", shape="shape", dtype="float32", refused="", compiles={})
    ran = {name: s for name, s in seconds.items() if s is not None}

    def ratios(own: str) -> dict[str, float]:
        return {name: s / ran[own] for name, s in ran.items() if name != own and own in ran}

    return [Row(backend=x, median_s=s, ratios=ratios(x), **one) for x, s in seconds.items()]


def test_a_default_may_be_five_percent_behind_the_best_other():
    (near,) = bench_kernels.defaults(rows(a=1.05, b=1.0, c=7.0))
    assert near == Default("op", "shape", "a", 1.05, True)
    (behind,) = bench_kernels.defaults(rows(a=1.06, b=2.0, c=1.0))
    assert not behind.within and behind.ratio == pytest.approx(1.06)
    (ahead,) = bench_kernels.defaults(rows(a=0.5, b=1.0))
    assert ahead.within and ahead.ratio == 0.5


def test_the_default_is_the_first_that_supports_the_call():
    (found,) = bench_kernels.defaults(rows(a=None, b=2.0, c=None))
    assert found == Default("op", "shape", "b", None, True)
    assert bench_kernels.defaults(rows(a=None)) == []


def test_a_default_that_fails_is_not_the_right_one():
    first, *others = rows(a=None, b=2.0, c=1.0)
    first = dataclasses.replace(first, refused="no room", failed=True)
    (found,) = bench_kernels.defaults([first, *others])
    assert found == Default("op", "shape", "a", None, False)
    assert bench_kernels.defaults([first]) == []
    (found,) = bench_kernels.defaults([*others, first])
    assert found == Default("op", "shape", "b", 2.0, False)


def test_peaks_are_the_best_of_before_and_after():
    before = bench_kernels.Peaks({"float32": 2.0, "bfloat16": 3.0}, 5.0, 8, 16)
    after = dataclasses.replace(before, flops={"float32": 4.0, "bfloat16": 1.0}, bandwidth=4.0)
    best = dataclasses.replace(before, flops={"float32": 4.0, "bfloat16": 3.0})
    assert before.best(after) == best


def test_a_row_holds_rates_against_peaks_and_others():
    nothing = dict(make=lambda key: (), call=lambda: None, refuse=lambda: None)
    one = Case(**nothing, flops=8e12, nbytes=6e9)
    found = {"a": [1.0, 4.0, 2.0], "b": Unrun("needs a GPU"), "c": [8.0]}
    said = {"h100": {("s", "a"): "ok"}, "b200": "no compiler"}
    peaks = bench_kernels.Peaks({"float32": 8e12}, 12e9, 8, 16)
    a, b, c = bench_kernels.case_rows("op", "s", one, found, said, peaks, jnp.dtype("float32"))
    assert (a.median_s, a.best_s, a.tflops, a.gbps) == (2.0, 1.0, 4.0, 3.0)
    assert (a.of_product, a.of_copy, a.ratios) == (0.5, 0.25, {"c": 4.0})
    assert a.compiles == {"h100": "ok", "b200": "no compiler"}
    assert (b.refused, b.failed, b.median_s, b.ratios) == ("needs a GPU", False, None, {})
    assert c.ratios == {"a": 0.25}


def test_ratios_are_those_of_each_round():
    """The second round was slow for both."""
    assert bench_kernels.in_turns([1.0, 6.0, 1.2], [2.0, 12.0, 2.0]) == 0.5


def test_the_same_program_is_timed_as_one():
    """`fewer_queries` is done at once, as the reference does it; `tiny_12` is not."""
    backends, found = OPS["attention/chunk_table"].backends, {}
    for shape in ("fewer_queries", "tiny_12"):
        made = case("attention/chunk_table", shape)
        able = {name: x for name, x in backends.items() if made.refusal(x) is None}
        found[shape] = bench_kernels.Timer(made, 2, 0, LITTLE).times(able)
        assert set(found[shape]) == {"xla", "reference"}
    assert found["fewer_queries"]["xla"] == found["fewer_queries"]["reference"]
    assert found["tiny_12"]["xla"] != found["tiny_12"]["reference"]


def test_another_constant_is_another_program():
    """However large: texts of compiled programs leave large ones out."""
    made = Case(lambda key: (jnp.ones((64, 64)),), lambda x, y: x * y, lambda _: None, 0.0, 0.0)
    timer, mask = bench_kernels.Timer(made, 1, 0, LITTLE), np.ones((64, 64), np.float32)
    other = mask.copy()
    other[40, 7] = 2
    operands = made.make(KEY)
    (one, _), (two, _), (again, _) = (timer._program(x, operands) for x in (mask, other, mask))
    assert one == again != two


def test_what_is_compared_is_measured_in_turns(monkeypatch):
    seen = []
    monkeypatch.setattr(bench_kernels, "seconds_of", lambda act, *_: seen.append(act()) or 0.5)
    nothing = Case(lambda key: (), lambda backend: backend, lambda backend: None, 0.0, 0.0)
    timer = bench_kernels.Timer(nothing, 2, 0, LITTLE)
    monkeypatch.setattr(
        timer.__class__, "_program", lambda self, backend, _: (str(backend), lambda: backend)
    )
    found = timer.times({"a": 1, "b": 2})
    assert seen == [1, 2, 1, 2, 1, 2]  # once to see how long it takes, then in turns
    assert found == {"a": [0.5, 0.5], "b": [0.5, 0.5]}


def test_what_takes_too_long_is_timed_once(monkeypatch):
    monkeypatch.setattr(bench_kernels, "seconds_of", lambda act, *_: act())
    nothing = Case(lambda key: (), lambda backend: backend, lambda backend: None, 0.0, 0.0)
    timer = bench_kernels.Timer(nothing, 3, 0, dataclasses.replace(LITTLE, budget_s=2.0))
    monkeypatch.setattr(
        timer.__class__, "_program", lambda self, backend, _: (str(backend), lambda: backend)
    )
    assert timer.times({"slow": 5.0, "fast": 1.0}) == {"slow": [5.0], "fast": [1.0] * 3}


def test_a_backend_that_fails_does_not_stop_the_others():
    def call(backend, x):
        if backend == "broken":
            raise NotImplementedError("no such layout\nand much more")
        return x

    made = Case(lambda key: (jnp.ones(3),), call, lambda backend: None, 0.0, 0.0)
    found = bench_kernels.Timer(made, 1, 0, LITTLE).times({"broken": "broken", "whole": "whole"})
    assert found["broken"] == Unrun("NotImplementedError: no such layout", failed=True)
    assert len(found["whole"]) == 1


def test_a_backend_without_room_says_so(monkeypatch):
    monkeypatch.setattr(bench_kernels.report, "free_memory", lambda: 0)
    timer = bench_kernels.Timer(case("nvfp4/matmul", "one_block"), 1, 0, LITTLE)
    found = timer.times({"reference": products.BACKENDS["reference"]})
    assert "needs 0.00 GB" in found["reference"].why and found["reference"].failed


def test_everything_is_measured_by_the_command(quick, tmp_path, capsys):
    path = tmp_path / "kernels.json"
    arguments = ["bench", "--suite", "kernels", "--repeat", "1", "--json", str(path)]
    assert cli.run(arguments) == 0
    said = json.loads(path.read_text("utf-8"))
    assert list(said)[: len(HEAD)] == list(HEAD)
    assert (said["suite"], said["model"], said["shapes"]) == ("kernels", "", "small")
    assert {row["op"] for row in said["rows"]} == set(OPS)
    for row in said["rows"]:
        assert row["compiles"] == {"h100": "no compiler", "b200": "no compiler"}
        assert bool(row["refused"]) == (row["median_s"] is None)
        if not row["refused"]:
            assert 0 < row["best_s"] <= row["median_s"]
            assert row["gbps"] > 0 and row["of_copy"] > 0
    of_matmul = {row["backend"]: row for row in said["rows"] if row["op"] == "nvfp4/matmul"}
    assert list(of_matmul) == list(products.BACKENDS)
    assert of_matmul["triton"]["refused"] == "needs an NVIDIA GPU"
    assert {x["op"] for x in said["defaults"]} == set(OPS)
    assert said["defaults_within"] == all(x["within"] for x in said["defaults"])
    one, other = (r for r in said["rows"] if r["op"] == "attention/chunk_table" and r["ratios"])
    assert one["ratios"][other["backend"]] == pytest.approx(1 / other["ratios"][one["backend"]])
    assert said["peaks"]["flops"].keys() == {"bfloat16", "float32"}
    out = capsys.readouterr().out
    for words in ("nvfp4/linear gradient", "needs an NVIDIA GPU", "no compiler", "measured peaks"):
        assert words in out


def test_what_is_too_large_is_left_out_and_named(quick, monkeypatch):
    monkeypatch.setattr(bench_kernels, "CPU", dataclasses.replace(LITTLE, budget_s=0.0))
    found = bench_kernels.run(op="nvfp4/m", shapes=None, repeat=1, seed=0)
    assert found.left_out == {"nvfp4/matmul": ("one_block",), "nvfp4/matmul_w4a16": ("one_block",)}
    assert found.rows == () and found.defaults_within


def test_on_a_cpu_large_shapes_are_only_compiled(quick, monkeypatch):
    asked = []

    def verdicts(gpu, op, shapes):
        asked.append((gpu, op, shapes))
        return {(shapes[0], "reference"): "ok", (shapes[0], "triton"): f"not on {gpu}"}

    monkeypatch.setattr(bench_compile, "missing", lambda: "")
    monkeypatch.setattr(bench_compile, "verdicts", verdicts)
    monkeypatch.setattr(bench_kernels, "CPU", dataclasses.replace(LITTLE, budget_s=0.0))
    found = bench_kernels.run(op="nvfp4/quantize", shapes="all", repeat=1, seed=0)
    assert asked == [(gpu, "nvfp4/quantize", ["one_tile"]) for gpu in ("h100", "b200")]
    one, other = found.rows
    assert (one.refused, one.compiles["h100"]) == ("too large to be run here", "ok")
    assert (other.backend, other.compiles["b200"]) == ("triton", "not on b200")
    assert found.left_out == {"nvfp4/quantize": ("one_tile",)}
    console = Console(record=True, width=140)
    for table in found.tables():
        console.print(table)
    assert "triton for b200: not on b200" in console.export_text()


def test_a_compiler_that_dies_is_an_answer(monkeypatch):
    class Done:
        returncode = -11
        stdout = '{"shape": "a", "backend": "reference", "verdict": "ok"}\nnoise\n'
        stderr = "first\nSegmentation fault\n"

    monkeypatch.setattr(bench_compile.subprocess, "run", lambda *_, **__: Done)
    found = bench_compile.verdicts("h100", "nvfp4/quantize", ["a", "b"])
    assert found["a", "reference"] == "ok"
    assert found["b", "triton"] == "the compiler ended with status -11: Segmentation fault"


@pytest.mark.aot
@pytest.mark.parametrize("gpu", bench_compile.GPUS)
def test_verdicts_are_the_compilers(gpu):
    if bench_compile.missing():
        pytest.skip("needs the [aot] extra")
    found = bench_compile.verdicts(gpu, "nvfp4/matmul", ["5b_up", "odd_columns"])
    assert found["5b_up", "reference"] == "ok"
    four_bits = found["5b_up", "cudnn"]
    assert four_bits == "ok" if gpu == "b200" else "no FP4 units" in four_bits
    if gpu == "b200":
        assert found["5b_up", "mosaic"] == "ok"
        assert "multiples" in found["odd_columns", "mosaic"]


@pytest.mark.aot
@pytest.mark.parametrize("gpu", bench_compile.GPUS)
def test_libraries_of_attention_are_compiled_for_a_gpu_that_is_not_there(gpu):
    """With neither cuDNN nor a device that a library would write its kernel for."""
    if bench_compile.missing():
        pytest.skip("needs the [aot] extra")
    found = bench_compile.verdicts(gpu, "attention/sink_window", ["1.3b_second"])
    assert len(found) > 3 and set(found.values()) == {"ok"}


def test_an_unknown_op_is_named(capsys):
    with pytest.raises(InputError, match="nvfp4/linear gradient"):
        bench_kernels.run(op="conv", shapes=None, repeat=1, seed=0)
    assert cli.run(["bench", "--suite", "kernels", "--op", "conv"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "kernels", "--steps", "2"], "--steps says nothing of --suite kernels"),
        (["--suite", "kernels", "--shapes", "huge"], "huge"),
        (["--suite", "generate", "--op", "nvfp4"], "--op says nothing of --suite generate"),
        (["--cpu_devices", "4"], "--cpu_devices says nothing of --suite generate"),
        (["--suite", "session", "--change", "cut"], "--change says nothing of --suite session"),
    ],
)
def test_flags_without_effect_are_refused(capsys, arguments, words):
    assert cli.run(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
