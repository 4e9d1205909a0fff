"""Plans: bytes from the real shapes, verdicts from bytes, and sentences for what is no plan."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from longlive_jax import cli, footprint, gpus, plan, rollout, weights
from longlive_jax.model import load
from longlive_jax.plan import Ask
from longlive_jax.vae.vae import init_carry

SPECS = pathlib.Path(__file__).parent / "gpu_specs"
TINY = Ask("tiny", 10.0, source="formula")


def bytes_of(preset, **choices):
    return plan.kv_bytes(Ask(preset, 240.0, **choices).check())


@pytest.mark.parametrize(
    ("preset", "token", "window"),
    [("wan21_1_3b", 184_320, 3.45e9), ("wan22_5b", 368_640, 10.38e9)],
)
def test_the_cache_is_as_large_as_was_designed(preset, token, window):
    ask = Ask(preset, 240.0)
    cfg = ask.config
    total = plan.kv_bytes(ask)
    assert total == token * cfg.stream.window * cfg.tokens_per_frame
    assert round(total / 1e9, 2) == window / 1e9


def test_low_bit_caches_count_their_scales():
    whole = bytes_of("wan22_5b")
    largest = 2 * 30 * 32 * 4  # a float32 for each layer and slot
    # LongLive 2.0 section 3.2, and that.
    assert bytes_of("wan22_5b", kv="nvfp4") == whole * 9 // 32 + largest
    assert round(bytes_of("wan22_5b", kv="nvfp4") / 1e9, 2) == 2.92
    head = footprint.kv_cache(plan.PRESETS["wan22_5b"])[0].shape[-1]
    for kind in ("int8", "fp8"):  # a float32 for every token and head
        assert bytes_of("wan22_5b", kv=kind) == whole // 2 + whole // 2 // head * 4


def test_no_negative_cache_at_guidance_1():
    one = footprint.kv_cache(Ask("wan22_5b", 1.0, guidance=1.0).config)
    two = footprint.kv_cache(Ask("wan22_5b", 1.0, guidance=3.0).config)
    assert one[0].shape[1] == 1 and two[0].shape[1] == 2
    assert bytes_of("wan22_5b", guidance=3.0) == 2 * bytes_of("wan22_5b", guidance=1.0)
    assert bytes_of("wan22_5b") == bytes_of("wan22_5b", guidance=1.0)


def test_low_bit_weights_of_the_5b_count_their_scales():
    """Beside 4.9 of 5 billion parameters that are in the blocks' matrices."""
    whole, eight, four = (
        footprint.nbytes(footprint.dit(Ask("wan22_5b", 1.0, precision=kind).config))
        for kind in ("bf16", "int8", "nvfp4")
    )
    assert 0.50 < eight / whole < 0.51
    assert 0.28 < four / whole < 0.30


@pytest.fixture(scope="module")
def tiny():
    return plan.make(TINY.check())


def test_the_bytes_are_those_of_a_model_that_is_there(tiny):
    model, memory = load("tiny"), tiny.memory
    for part in ("dit", "text", "vae"):
        module = model.text.umt5 if part == "text" else getattr(model, part)
        count = sum(leaf.size for leaf in weights.flatten(module).values())
        assert getattr(memory.weights, part) == 2 * count
    state = rollout.begin(model.config, [0], jax.numpy.bfloat16)
    assert memory.kv_cache == state.cache.k.nbytes + state.cache.v.nbytes
    assert memory.held_latents == state.held.latents.nbytes
    carry = init_carry(model.vae, 1, model.config.height, model.config.width)
    carry = sum(x.size for x in jax.tree.leaves(carry))
    assert memory.vae_carry == 2 * carry
    assert memory.text_kv == sum(x.size for x in jax.tree.leaves(model.prompt_kv(["a dot"]))) * 2


def test_the_formula_sees_the_scores(tiny):
    """Float32 scores, bf16 weights of the softmax, values and result, by hand; around the block its
    input, and the number of its layer. cuDNN, the default, writes no scores.
    """
    stream = dataclasses.replace(TINY.config.stream, attention="xla")
    cfg = dataclasses.replace(TINY.config, stream=stream)
    keys = cfg.stream.window * cfg.tokens_per_frame
    scores = cfg.dit.heads * keys**2
    tokens = keys * cfg.dit.dim * 2
    found = footprint.by_formula(cfg, gpus.find("h100"), ("switch",))["switch"]
    assert found == 6 * scores + 2 * tokens + tokens + 4
    assert tiny.memory.activations["switch"] < found / 2


def test_the_table_says_that_there_is_no_negative_cache(tiny):
    words = {name: what for name, _, what in plan.rows(tiny)}
    assert "no negative cache" in words["KV cache"]
    guided = dataclasses.replace(tiny, ask=dataclasses.replace(TINY, guidance=3.0))
    words = {name: what for name, _, what in plan.rows(guided)}
    assert "conditional and unconditional" in words["KV cache"]


def test_length_does_not_matter(tiny):
    longer = plan.make(dataclasses.replace(TINY, seconds=3600.0).check())
    assert longer.memory == tiny.memory
    assert json.loads(longer.to_json())["frames"] == 57600


def test_the_peak_is_the_largest_program_on_top_of_what_stays(tiny):
    memory = tiny.memory
    held = sum((memory.weights.total, memory.kv_cache, memory.held_latents, memory.text_kv)) + (
        memory.vae_carry
    )
    made = [memory.activations[name] for name in ("text", "denoise", "decode")]
    assert memory.peak(switch=False) == held + max(made)
    assert memory.peak(switch=True) == held + max(memory.activations.values())


def test_a_mesh_divides_the_cache_and_the_transformer_only(tiny):
    ask = dataclasses.replace(TINY, mesh="2x4").check()
    memory = plan.resident(ask, tiny.memory.activations)
    assert memory.kv_cache * 4 == tiny.memory.kv_cache
    assert memory.weights == tiny.memory.weights
    assert memory.vae_carry == tiny.memory.vae_carry
    assert memory.activations["denoise"] == tiny.memory.activations["denoise"] // 4
    assert memory.activations["decode"] == tiny.memory.activations["decode"]
    assert any("not runnable yet" in text for text in plan.not_yet(ask))


def test_what_divides_is_named():
    assert plan.split(plan.PRESETS["wan22_5b"], 8) == "heads"
    assert plan.split(plan.PRESETS["wan21_1_3b"], 8) == "tokens"  # 12 heads


@pytest.mark.parametrize("kind", ["int8", "fp8", "nvfp4"])
def test_fewer_bits_are_planned_with_the_programs_that_run_them(tiny, kind):
    made = plan.make(dataclasses.replace(TINY, precision=kind, kv=kind).check())
    assert plan.not_yet(made.ask) == plan.not_yet(TINY) == ()
    memory = made.memory
    assert memory.weights.dit < tiny.memory.weights.dit
    assert memory.weights.text == tiny.memory.weights.text
    assert memory.kv_cache < tiny.memory.kv_cache
    assert all(memory.activations.values())


# Footprints of activations, in bytes.
def made(text=0, denoise=0, decode=0, switch=0):
    return {"text": text, "denoise": denoise, "decode": decode, "switch": switch}


ADVICE = {
    "by default": ("h100", made(), r"Fits: 0\.\d\d GB of 84\.94 GB, switches included\."),
    "with more": ("h100", made(decode=int(70e9)), r"Fits with XLA_PYTHON_CLIENT_MEM_FRACTION=0\.8"),
    "no switch": (
        "h100",
        made(switch=int(100e9)),
        r"but a switch needs 100\.\d GB and does not fit: change prompts by cuts\.",
    ),
    "elsewhere": (
        "h100",
        made(decode=int(95e9)),
        r"Does not fit: 95\.\d\d GB of 84\.94 GB; it would on NVIDIA RTX PRO 6000 "
        r"\(--gpu rtx6000pro\)\.",
    ),
    "shared": (
        "h100",
        made(denoise=int(95e9)),
        r"or here with --precision bf16 --kv int8 --mesh 1x2 once that runs\.",
    ),
    "nowhere": ("h100", made(decode=int(900e9)), r"nothing in the tables is large enough\."),
}


@pytest.mark.parametrize(("gpu", "activations", "sentence"), ADVICE.values(), ids=ADVICE)
def test_the_advice_is_one_sentence(gpu, activations, sentence):
    ask = dataclasses.replace(TINY, gpu=gpu)
    said = plan.advise(ask, plan.resident(ask, activations), activations)
    assert re.search(sentence, said), said


def test_memory_is_left_for_the_driver():
    gpu = gpus.find("h100")
    assert plan.room(gpu, gpu.memory // 2) == plan.SHARE
    assert plan.room(gpu, int(0.955 * gpu.memory)) == 0.96
    assert plan.room(gpu, gpu.memory - plan.RESERVED // 2) is None


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.txtpb")), ids=lambda path: path.stem)
def test_gpus_are_described_as_in_the_compile_tests(path):
    gpu = gpus.find(path.stem)
    pattern = r"(device_memory_size|core_count|l2_cache_size|major|minor|clock_rate_ghz): ([\d.]+)"
    ours, theirs = (re.findall(pattern, text) for text in (gpu.describe(), path.read_text()))
    assert sorted(ours) == sorted(theirs)


def longlive(capsys, *arguments):
    code = cli.run(("plan", *arguments))
    return code, *capsys.readouterr()


def test_the_command_shows_a_table_and_writes_its_schema(capsys, tmp_path):
    target = tmp_path / "plan.json"
    flags = ("--preset", "tiny", "--seconds", "5", "--source", "formula")
    code, out, err = longlive(capsys, *flags, "--json", str(target))
    assert code == 0, err
    for word in ("KV cache", "peak", "by formula", "Fits: "):
        assert word in out
    data = json.loads(target.read_text())
    assert data["bytes_per_device"]["weights"].keys() == {"dit", "text", "vae"}
    assert data["bytes_per_device"]["activations"].keys() == {"text", "denoise", "decode", "switch"}
    assert (data["frames"], data["source"], data["fits"]) == (80, "formula", True)
    assert data["runnable"] and not data["not_yet"]
    assert data["ask"]["guidance"] == 1.0


def test_the_plan_can_be_standard_output(capsys):
    flags = ("--preset", "tiny", "--source", "formula", "--kv", "int8", "--json", "-")
    code, out, err = longlive(capsys, *flags)
    assert code == 0
    assert json.loads(out)["ask"]["kv"] == "int8" and json.loads(out)["runnable"]
    assert "int8: window of" in err


@pytest.mark.parametrize("plugin", ["longlive_jax.none", "no_plugins.none"])
def test_without_the_compiler_the_plan_says_so(capsys, monkeypatch, plugin):
    monkeypatch.setattr(footprint, "PLUGIN", plugin)
    code, out, err = longlive(capsys, "--preset", "tiny")
    assert code == 0, err
    assert "the compiler for GPUs is not installed" in out
    code, out, err = longlive(capsys, "--preset", "tiny", "--source", "compiled")
    assert (code, out) == (2, "")
    assert "pip install 'longlive-jax[aot]'" in err


BAD = {
    "no preset": ([], "say which model: --preset tiny"),
    "unknown preset": (["--preset", "wan9"], '--preset "wan9" is not known: say tiny'),
    "unknown gpu": (["--preset", "tiny", "--gpu", "tpu"], '--gpu "tpu" is not known: say rtx4090'),
    "unknown precision": (["--preset", "tiny", "--precision", "fp7"], "say bf16, int8, fp8"),
    "unknown kv": (["--preset", "tiny", "--kv", "x"], '--kv "x"'),
    "unknown source": (["--preset", "tiny", "--source", "oracle"], '--source "oracle"'),
    "no mesh": (["--preset", "tiny", "--mesh", "8"], '--mesh "8" is no mesh'),
    "empty mesh": (["--preset", "tiny", "--mesh", "0x8"], '--mesh "0x8" is no mesh'),
    "odd mesh": (["--preset", "wan22_5b", "--mesh", "1x7"], "divide neither the 24 heads"),
    "no length": (["--preset", "tiny", "--seconds", "0"], "--seconds must be"),
    "endless": (["--preset", "tiny", "--seconds", "inf"], "--seconds must be"),
    "under a frame": (["--preset", "tiny", "--seconds", "0.01"], "0.01 s at 16 FPS"),
    "not a guidance": (["--preset", "tiny", "--guidance", "nan"], "--guidance must be 0 or more"),
    "unwritable": (["--preset", "tiny", "--json", "no/plan.json"], "there is no folder no"),
}


@pytest.mark.parametrize(("arguments", "reason"), BAD.values(), ids=BAD)
def test_bad_flags_are_one_sentence_and_code_2(capsys, arguments, reason):
    code, out, err = longlive(capsys, *arguments)
    assert (code, out) == (2, "")
    assert reason in err
    assert err.startswith("longlive: ") and err.count("\n") == 1


def test_bad_flags_are_answered_without_loading_jax():
    script = (
        "import sys; from longlive_jax import cli; "
        "code = cli.run(['plan', '--preset', 'tiny', '--gpu', 'x']); "
        "sys.exit(code + 10 * ('jax' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
