"""Plans of training: bytes from the real shapes, work from the real order, sentences for what is no
plan.
"""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from longlive_jax import cli, footprint, gpus, sharding, weights
from longlive_jax import plan as generation
from longlive_jax.train import collectives, plan, work
from longlive_jax.train.plan import Ask

TINY = Ask("tiny", 16.0, mesh="1x8", source="formula")
LARGE = Ask("wan22_5b", 64.0, mesh="1x8", source="formula")


@functools.cache
def made(ask):
    return plan.make(ask.check())


def longlive(capsys, *arguments):
    code = cli.run(("plan", "--train", *arguments))
    return code, *capsys.readouterr()


@pytest.mark.parametrize("ask", [TINY, LARGE, dataclasses.replace(LARGE, mesh="1x4")])
def test_balanced_sp_is_balanced(ask):
    work = made(ask).work
    assert work.keys() == {"alone", "plain", "balanced"}
    assert all(part <= 1.01 for part in work["balanced"].balance.values())
    assert work["plain"].balance["loss"] == 2.0  # half of the ranks have clean frames only
    assert all(part == 1.0 for part in work["alone"].balance.values())


@pytest.mark.parametrize("ranks", [4, 8])
def test_plain_sp_encodes_the_video_on_every_rank(ranks):
    work = made(dataclasses.replace(LARGE, mesh=f"1x{ranks}")).work
    assert work["plain"].latents == (384,) * ranks
    assert work["balanced"].latents == (384 // ranks,) * ranks
    assert work["plain"].slowest["vae"] == ranks * work["balanced"].slowest["vae"]
    assert work["plain"].slowest["total"] > 1.05 * work["balanced"].slowest["total"]
    assert sum(work["balanced"].parts["total"]) == pytest.approx(work["alone"].slowest["total"])


def test_the_work_is_what_was_reckoned_by_hand():
    """64 s of the 5B: 193.4 PFLOP of attention, 24.0 of products with weights and text."""
    tokens, chunks, dim, ffn, layers, text = 2 * 384 * 880, 48, 3072, 14336, 30, 512
    pairs = (8 * 880) ** 2 * (chunks * (chunks + 1) // 2 + chunks * (chunks - 1) // 2 + chunks)
    attention = 4.5 * 4 * dim * layers * pairs
    weight = layers * (6 * dim**2 + 2 * dim * ffn) + 2 * 48 * 4 * dim  # and patches, in and out
    linear = 4 * tokens * (2 * weight + 4 * layers * text * dim)
    assert (round(attention / 1e15, 1), round(linear / 1e15, 1)) == (193.4, 24.0)
    assert made(LARGE).work["alone"].dit[0] == pytest.approx(attention + linear)


def test_the_encoder_is_counted_as_xla_counts_its_products():
    """At least the products of its first and largest level."""
    cfg = LARGE.config
    pixels, width = (cfg.height // 2) * (cfg.width // 2), cfg.vae.encoder_dim
    level = 4 * 4 * 2 * 27 * width * width * pixels  # convolutions, frames
    assert level < work.encoder_flops(cfg) < 10 * level


def test_the_bytes_are_those_of_a_state_that_is_there():
    mesh = sharding.make_mesh(1, 2, 4)
    ask = dataclasses.replace(TINY, mesh="2x4").check()
    program = plan.program(ask.config, mesh)
    zeros = {name: jnp.zeros(x.shape) for name, x in weights.flatten(program.abstract).items()}
    program = dataclasses.replace(program, abstract=weights.unflatten(program.abstract, zeros))
    state, memory = program.create(zeros), plan.resident(ask, 0)
    for name in ("weights", "ema", "optimizer"):
        leaves = jax.tree.leaves(getattr(state, name))
        there = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        assert getattr(memory, name) == there
    assert plan.share_of_weights(ask) == pytest.approx(1 / 8, abs=0.01)


@pytest.mark.parametrize("balanced", [True, False])
def test_the_step_that_is_planned_is_one(balanced):
    """It lowers for the devices here, its state donated, and its shapes come back."""
    ask = dataclasses.replace(TINY, mesh="2x4", accumulate=2).check()
    with jax.numpy_dtype_promotion("standard"):
        lowered = plan.lower(ask, sharding.make_mesh(1, 2, 4), balanced=balanced)
    state, (loss, norm, t) = lowered.out_info
    assert [x.shape for x in state] == [x.shape for x in jax.tree.leaves(plan._state(ask.config))]
    assert loss.shape == norm.shape == () and t.shape == (2, 2, ask.length)


def test_weights_that_are_spread_are_smaller():
    alone, four, eight = (made(dataclasses.replace(LARGE, mesh=m)) for m in ("1x1", "1x4", "1x8"))
    assert alone.share == 1.0 and four.share == pytest.approx(1 / 4, rel=0.01)
    assert four.memory.weights == pytest.approx(2 * eight.memory.weights, rel=0.01)
    assert "whole on every device" in alone.how and "1/3.99 on every device" in four.how
    assert not four.fits and eight.fits and eight.how.startswith("Fits")
    assert "all-gather" in four.step.collectives.keys() - alone.step.collectives.keys()


def test_longer_videos_need_more():
    long, short = made(TINY), made(dataclasses.replace(TINY, seconds=64.0))
    assert long.memory.activations < short.memory.activations
    assert long.memory.weights == short.memory.weights


def test_parts_are_exchanged_one_after_the_other():
    one, two = made(TINY), made(dataclasses.replace(TINY, accumulate=2))
    for kind, size in one.step.collectives.items():
        assert two.step.collectives[kind] == 2 * size
    assert two.memory.videos == 2 * one.memory.videos
    parameters = one.memory.weights
    assert two.memory.activations == one.memory.activations + parameters  # their sum, in float32


@pytest.mark.parametrize(
    ("preset", "seconds", "mesh", "latents"),
    [
        ("wan22_5b", 16.0, "1x4", 96),
        ("wan22_5b", 16.0, "1x8", 128),
        ("wan22_5b", 64.0, "1x8", 384),
        ("wan21_1_3b", 16.0, "1x4", 72),
    ],
)
def test_seconds_are_filled_up_to_whole_chunks_on_every_rank(preset, seconds, mesh, latents):
    ask = Ask(preset, seconds, mesh=mesh).check()
    assert ask.length == latents
    assert bool(ask.rounded) == (ask.wanted != latents)


HLO = """\
HloModule step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %r = f32[] add(%x, %y)
}

%inner (p: (s32[], bf16[4,2])) -> (s32[], bf16[4,2]) {
  %start = ((bf16[4,2]), bf16[2,4]) all-to-all-start(%p), replica_groups={}
  ROOT %done = bf16[2,4]{1,0} all-to-all-done(%start)
}

%outer (p: (s32[], bf16[4,2])) -> (s32[], bf16[4,2]) {
  %w = (s32[]) while(%p), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %sum = (f32[3]{0}, f32[]) all-reduce(%a, %b), to_apply=%add
}

ENTRY %main (p: s32[]) -> s32[] {
  %w = (s32[]) while(%p), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %gathered = bf16[8]{0} all-gather(%p), dimensions={0}
}
"""


def test_what_is_in_a_loop_is_counted_as_often_as_it_runs():
    assert collectives.nbytes(HLO) == {
        "all-to-all": 3 * 5 * 16,
        "all-reduce": 3 * (12 + 4),
        "all-gather": 16,
    }
    with pytest.raises(ValueError, match="does not say how often it runs"):
        collectives.nbytes(HLO.replace("known_trip_count", "unknown"))


def test_the_largest_of_what_is_sent():
    assert collectives.largest(HLO) == 16
    assert collectives.largest(HLO.replace("f32[3]{0}, f32[]", "f32[3]{0}, f32[5]")) == 32
    assert collectives.largest("ENTRY %main (x: f32[]) -> f32[] {") == 0


@pytest.mark.slow
def test_the_collectives_are_those_of_a_program_that_is_there(monkeypatch):
    """The exchange of a step on devices that are here, by formula and by its program. Weights are
    left whole: of spread ones XLA sends a little in the same way.
    """
    whole = lambda name, shape, mesh: NamedSharding(mesh, PartitionSpec())  # noqa: E731
    monkeypatch.setattr(sharding, "of_weight", whole)
    ask = dataclasses.replace(TINY, mesh="1x4", latents=12).check()
    with jax.numpy_dtype_promotion("standard"):
        hlo = plan.lower(ask, sharding.make_mesh(1, 1, 4)).compile().as_text()
    # On a CPU bfloat16 may be sent as float32.
    ratio = collectives.nbytes(hlo)["all-to-all"] / plan.formula(ask).collectives["all-to-all"]
    assert ratio in (1.0, 2.0)


def test_the_command_shows_tables_and_writes_its_schema(capsys, tmp_path):
    target = tmp_path / "plan.json"
    flags = ("--preset", "tiny", "--seconds", "16", "--mesh", "1x8", "--source", "formula")
    code, out, err = longlive(capsys, *flags, "--json", str(target))
    assert code == 0, err
    for word in ("all-to-all", "peak", "balance of the ranks", "by formula", "Fits: ", "72 (18.0"):
        assert word in out
    data = json.loads(target.read_text())
    memory = data["peak_bytes_per_device"]
    parts = {"weights", "ema", "optimizer", "videos", "activations"}
    assert memory.keys() == parts | {"peak"}
    assert memory["peak"] == sum(memory[name] for name in parts)
    assert memory["weights"] == memory["ema"]
    for way in ("alone", "plain", "balanced"):
        assert data["balance"][way].keys() == {"dit", "vae", "loss", "total"}
    assert data["balance"]["balanced"]["total"] <= 1.01
    assert data["collective_bytes"].keys() == {"all-to-all", "reduce-scatter", "all-gather"}
    assert data["plain_moves_bytes"] > 0
    assert data["vae_latents"] == {"alone": [72], "plain": [72] * 8, "balanced": [9] * 8}
    assert data["vae"]["halo"]["balance"] > data["vae"]["neighbour"]["balance"] == 1.0
    assert (data["latents"], data["frames"], data["source"]) == (72, 285, "formula")
    assert data["fits"] and any("16 s are 64 latents" in note for note in data["notes"])


def test_without_the_compiler_the_plan_says_so(capsys, monkeypatch):
    monkeypatch.setattr(footprint, "PLUGIN", "longlive_jax.none")
    code, out, err = longlive(capsys, "--preset", "tiny", "--mesh", "1x8")
    assert code == 0, err
    assert "the compiler for GPUs is not installed" in out
    code, out, err = longlive(capsys, "--preset", "tiny", "--source", "compiled")
    assert (code, out) == (2, "")
    assert "pip install 'longlive-jax[aot]'" in err


BAD = {
    "no preset": ([], "say which model: --preset tiny"),
    "unknown preset": (["--preset", "wan9"], '--preset "wan9" is not known: say tiny'),
    "unknown gpu": (["--preset", "tiny", "--gpu", "tpu"], '--gpu "tpu" is not known'),
    "unknown source": (["--preset", "tiny", "--source", "oracle"], '--source "oracle"'),
    "no mesh": (["--preset", "tiny", "--mesh", "8"], '--mesh "8" is no mesh'),
    "no length": (["--preset", "tiny", "--seconds", "0"], "--seconds must be"),
    "frames": (
        ["--preset", "wan22_5b", "--latents", "100", "--mesh", "1x8"],
        "100 latent frames do not divide into 8 ranks of whole chunks of 8",
    ),
    "heads": (
        ["--preset", "wan21_1_3b", "--mesh", "1x8"],
        "12 heads do not divide over 8 ranks of a sequence",
    ),
    "of generation": (["--preset", "tiny", "--kv", "int8"], "--kv says nothing of training"),
    "unwritable": (["--preset", "tiny", "--json", "no/plan.json"], "there is no folder no"),
}


@pytest.mark.parametrize(("arguments", "reason"), BAD.values(), ids=BAD)
def test_bad_flags_are_one_sentence_and_code_2(capsys, arguments, reason):
    code, out, err = longlive(capsys, *arguments)
    assert (code, out) == (2, "")
    assert reason in err
    assert err.startswith("longlive: ") and err.count("\n") == 1


def test_a_flag_of_training_alone_is_refused(capsys):
    code = cli.run(("plan", "--preset", "tiny", "--accumulate", "2"))
    assert code == 2
    assert "--accumulate says nothing of generation" in capsys.readouterr().err


def test_bad_flags_are_answered_without_loading_jax():
    script = (
        "import sys; from longlive_jax import cli; "
        "code = cli.run(['plan', '--train', '--preset', 'tiny', '--gpu', 'x']); "
        "sys.exit(code + 10 * ('jax' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr


def test_the_advice_names_what_is_large_enough():
    memory = plan.Memory(weights=0, ema=0, optimizer=0, videos=0, activations=int(100e9))
    said = plan.advise(LARGE, memory)
    assert "it would on NVIDIA H200 (--gpu h200)" in said
    nothing = dataclasses.replace(memory, activations=int(900e9))
    assert "shorten the videos" in plan.advise(LARGE, nothing)
    assert np.isfinite(generation.room(gpus.find("h100"), 1))
