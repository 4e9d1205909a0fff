"""Distillation and long tuning of a small model: on any mesh, stopped anywhere."""

import dataclasses
import functools
import json
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streams
import training
from test_media import still
from training import SMALL, lines, same

import longlive_jax
from longlive_jax import lora, sharding, weights
from longlive_jax.config import SamplerConfig
from longlive_jax.errors import InputError
from longlive_jax.train import distill_run, export
from longlive_jax.train import state as train_state
from longlive_jax.train.checkpoint import Checkpoints
from longlive_jax.train.distill import Clips, Party, Program
from longlive_jax.train.distill_run import DistillConfig, Run
from longlive_jax.train.dmd import DMDConfig
from longlive_jax.train.learning import Learning
from longlive_jax.train.prompts import PromptConfig, Prompts
from longlive_jax.train.state import OptimizerConfig

LONG = Clips(first=3, next=2, length=7, newest=True)
ONE = Clips(first=3, next=3, length=3)
OPTIMIZER = OptimizerConfig(1e-2, 4, warmup=1, b1=0.5, ema=0.5)
SGD = dataclasses.replace(OPTIMIZER, kind="sgd")
MOSAIC = dataclasses.replace(SMALL.stream, attention="mosaic")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return training.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    said = [["a red circle", "a blue square"], ["a white circle moves left", "a green triangle"]]
    path.write_text("\n".join(map(json.dumps, said * 4)) + "\n")
    return path


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Runs of the same program share what is compiled, in half the time."""
    inner = Program.compile
    made = {}

    def in_haste(program, which, frozen, **choices):
        key = program, which, *choices.items(), str(jax.tree.structure(frozen))
        if key not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(jax, "jit", streams.jit)
                made[key] = inner(program, which, frozen, **choices)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "compile", in_haste)
        patch.setattr(longlive_jax, "load", functools.cache(longlive_jax.load))
        yield


@pytest.fixture
def given(model, prompts):
    def make(clips=LONG, rank=2, **changes):
        switch = (3, 5, 2) if clips is LONG else None
        made = dict(
            model=str(model),
            prompts=PromptConfig(str(prompts), clips.length, 4, switch=switch, seed=1),
            clips=clips,
            judge=DMDConfig(1, shift=3.0, real_guidance=1.0),
            student=Party(Learning(rank), OPTIMIZER),
            fake=Party(Learning(rank), OPTIMIZER),
            stream=SMALL.stream,
            steps=2,
            every=2,
            seed=5,
            log_every=1,
            save_every=2,
        )
        return DistillConfig(**made | changes)

    return make


def until(run, step, monkeypatch):
    """Trains, and tells the process to end in the middle of the step that comes to `step`."""
    inner = run._step

    def told(state, number):
        if number == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(state, number)

    monkeypatch.setattr(run, "_step", told)
    return run.train()


def values(workdir):
    return [{k: v for k, v in line.items() if k != "step"} for line in lines(workdir)]


@pytest.mark.long
@pytest.mark.parametrize("rank", [2, 0], ids=["lora", "all weights"])
def test_four_devices_are_one(tmp_path, given, rank):
    """Losses, norms, and all that was learned; weights move by up to 1e-2 a step."""
    alone = Run(given(LONG, rank), tmp_path / "alone").train()
    run = Run(given(LONG, rank, data=2, fsdp=2), tmp_path / "four")
    state = run.train()
    for one, other in zip(values(tmp_path / "four"), values(tmp_path / "alone"), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    same(state, alone, rtol=1e-3, atol=2e-4)
    assert any(not x.sharding.is_fully_replicated for x in state.weights.values())
    frozen = [run.frozen.teacher] if not rank else [run.frozen.teacher, run.frozen.student]
    for dit in frozen:
        assert not dit.blocks.ffn_in.kernel[...].sharding.is_fully_replicated
    assert not run.sequence.memory.cache.k.sharding.is_fully_replicated


OTHER = dataclasses.replace(SMALL.dit, dim=64, ffn_dim=96, layers=2)
BIDIRECTIONAL = DMDConfig(1, shift=3.0, real_guidance=3.0, causal=False, whole=True)


@pytest.mark.long
@pytest.mark.parametrize(
    "clips, shot, changes",
    [
        (LONG, 0, dict(judge=BIDIRECTIONAL, through="straight", same_exit=False)),
        (ONE, 2, dict(precision=(("student", "nvfp4"), ("teacher", "int8"), ("critic", "fp8")))),
    ],
    ids=["straight", "shots from a picture, in few bits"],
)
def test_a_larger_teacher_and_all_that_has_a_name(tmp_path, given, clips, shot, changes):
    """A teacher that sees whole clips, a memory with a gradient and exits of their own; shots, and
    frozen weights in few bits: after a step, all that learns has moved.
    """
    teacher = training.write_model(tmp_path / "teacher", dataclasses.replace(SMALL, dit=OTHER))
    party = Party(Learning(2), dataclasses.replace(OPTIMIZER, steps=1, warmup=0))
    made = given(clips, teacher=str(teacher), student=party, fake=party, every=1, **changes)
    if shot:  # of videos that begin with a picture
        still(tmp_path / "a.png", np.full((SMALL.height, SMALL.width, 3), 99, np.uint8))
        line = json.dumps({"prompts": ["a red circle", "a blue square"], "image": "a.png"})
        (tmp_path / "prompts.jsonl").write_text(line)
        told = dict(shot=shot, file=str(tmp_path / "prompts.jsonl"))
        made = dataclasses.replace(made, prompts=dataclasses.replace(made.prompts, **told))
    run = Run(made, tmp_path / "run")
    begun, after = run._begin(), run.train()
    (line,) = values(tmp_path / "run")
    assert all(np.isfinite(x) and x > 0 for x in line.values()), line
    for learned, before in (
        (after.weights, begun.weights),
        (after.critic.weights, begun.critic.weights),
    ):
        unmoved = [name for name, x in learned.items() if np.array_equal(x, before[name])]
        # A's gradient goes through B, which begins at zero.
        assert all(name.endswith("lora_a") for name in unmoved) and len(unmoved) < len(learned)


def test_both_learn(tmp_path, given):
    """B of the student's LoRA begins at zero; after a step no layer's is, nor is the critic's."""
    run = Run(given(ONE), tmp_path)
    state = run.train()
    for learned in (state.weights, state.critic.weights):
        of_b = {name: x for name, x in learned.items() if name.endswith("lora_b")}
        assert len(of_b) == 10
        for name, x in of_b.items():
            assert np.abs(x).max() > 0, name


def test_a_run_goes_on_in_the_middle_of_a_sequence_bit_for_bit(tmp_path, given, monkeypatch):
    """A sequence has three clips, and a step takes one or two of them."""
    made = given()
    expected = Run(made, tmp_path / "whole").train()
    stopped = Run(made, tmp_path / "parts")
    until(stopped, 3, monkeypatch)
    assert int(stopped.sequence.memory.chunk[0]) == 5  # of 7
    resumed = Run(made, tmp_path / "parts")
    assert resumed.checkpoints.latest == 3
    same(resumed.train(), expected)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_what_is_written_is_a_lora_of_the_model(tmp_path, given, model):
    """It is read by `load`, and makes of the model what the run had."""
    run = Run(given(ONE), tmp_path)
    state = run.train()
    run.finish(state)
    tuned = longlive_jax.load(str(model), lora=str(tmp_path / "lora.safetensors"))
    ours = distill_run.tuned(run.model, run.program.student.learning, state.ema)
    same(
        weights.flatten(lora.merge(tuned.dit, lora.read(tmp_path / "lora.safetensors"))),
        weights.flatten(lora.merge(ours.dit, run.program.student.learning.adapter(state.ema))),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.long
def test_memory_does_not_grow_with_the_video(given, model, tmp_path):
    """A step of a sequence of a minute takes what one of ten seconds takes: 960 and 160 frames."""

    def size(length):
        clips = Clips(first=3, next=2, length=length, newest=True)
        made = given(clips)
        made = dataclasses.replace(made, prompts=dataclasses.replace(made.prompts, chunks=length))
        run = Run(made, tmp_path / str(length))
        leaves, tree = distill_run.sequence_like(run.program, run.frozen, next(run.prompts))
        make = functools.partial(run.program.create, key=jax.random.key(0))
        state = jax.eval_shape(make, run.frozen)

        @functools.partial(streams.jit, donate_argnums=(0, 1))
        def step(state, leaves, frozen, key):
            given = jax.tree.unflatten(tree, leaves)
            choices = dict(begins=False, goes_on=True)
            made = run.program.student_step(state, frozen, given, key, **choices)
            return made[0], jax.tree.leaves(made[1])

        lowered = step.lower(state, leaves, run.frozen, jax.random.key(0))
        memory = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes

    assert size(240) <= 1.1 * size(40)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(judge=DMDConfig(2)), "judged in chunks of 2, and made in chunks of 1"),
        (dict(precision=(("teacher", "fp4"),)), "precision of the teacher: blocks.* in 'fp4'"),
        (dict(precision=(("judge", "int8"),)), "precision of 'judge': choose student, "),
        (dict(dtype="float16"), "dtype 'float16': choose one of"),
        (dict(fake=Party(Learning(2), SGD)), "unknown optimizer 'sgd'; choose adamw or muon"),
        (dict(stream=MOSAIC), "attention: mosaic needs an NVIDIA GPU"),
        (dict(judge=DMDConfig(1, attention="mosaic")), "attention: mosaic needs an NVIDIA GPU"),
        (dict(every=0), "the student takes a step every 0: at least every 1"),
        (dict(steps=2, timesteps=(9,)), "rolled out: the euler solver places its own timesteps"),
        (dict(steps=-1), "cannot be rolled out: a sampler takes at least 1 step, not -1"),
        (dict(through="both"), "cannot be rolled out: through 'both': choose stop, straight"),
    ],
)
def test_bad_configs_are_refused(tmp_path, given, changes, message):
    with pytest.raises(InputError, match=message):
        Run(given(ONE, **changes), tmp_path)


def test_a_run_in_the_place_of_its_model_or_prompts_is_refused(given):
    made = given(ONE)
    for name, place in (("model", made.model), ("prompts.file", made.prompts.file)):
        with pytest.raises(InputError, match=f"--workdir .* is what {name} reads"):
            Run(made, pathlib.Path(place))


def test_steps_that_a_list_does_not_have_are_refused(tmp_path, given):
    """As the 1.3B has one of four."""
    listed = SamplerConfig("renoise", 4, 3.0, timesteps=(1000, 750, 500, 250))
    folder = training.write_model(tmp_path / "model", dataclasses.replace(SMALL, sampler=listed))
    given = functools.partial(given, ONE, model=str(folder))
    for changes, message in (
        (dict(steps=2), "4 timesteps are listed for 2 steps"),
        (dict(steps=2, timesteps=(500, 1000)), "timesteps must fall within 1000"),
    ):
        with pytest.raises(InputError, match=f"cannot be rolled out: {message}"):
            Run(given(**changes), tmp_path / "run")
    run = Run(given(steps=2, timesteps=(1000, 500)), tmp_path / "run")
    assert run.program.roll.steps == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(steps=1), "another number of the student's steps: 2, not 1"),
        (dict(clips=Clips(3, 1, 7, newest=True)), "another cut into clips: "),
        (dict(teacher="tiny"), 'another teacher: null, not "tiny"'),
        (dict(rank=3), "another LoRA of the student: "),
    ],
)
def test_another_run_in_the_folder_is_refused(tmp_path, given, model, changes, message):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = train_state.create({"w": jnp.ones(2)}, OPTIMIZER)
    checkpoints.save(state, {"taken": 0}, given().to_json())
    checkpoints.wait()
    with pytest.raises(InputError, match=message):
        checkpoints.restore(state, given(**{"clips": LONG} | changes).to_json())
    checkpoints.close()


def test_a_run_of_all_weights_becomes_a_model_of_its_steps(tmp_path, given):
    made = given(ONE, rank=0)
    state = Run(made, tmp_path / "run").train()
    assert export.run(tmp_path / "run", tmp_path / "model") == 4
    found = longlive_jax.load(tmp_path / "model")
    same(weights.flatten(found.dit), dict(state.ema))
    assert found.config.sampler == dataclasses.replace(SMALL.sampler, steps=2)
    assert found.config.stream == made.stream


def test_a_lora_is_not_exported_as_a_model(tmp_path, given):
    run = Run(given(ONE), tmp_path / "run")
    run.train()
    with pytest.raises(InputError, match="learns a LoRA, .* `longlive merge-lora` adds that"):
        export.run(tmp_path / "run", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_switch_inside_a_clip_of_one_prompt_is_refused(tmp_path, given):
    """Its chunks before the switch would be judged by a prompt that they were not made under."""
    made = given(LONG)
    inside = dataclasses.replace(made.prompts, switch=(3, 5, 1))
    message = "a switch at chunk 4 is inside a clip, .* clips begin at chunks 3, 5, …"
    with pytest.raises(InputError, match=message):
        Run(dataclasses.replace(made, prompts=inside), tmp_path)
    apart = dataclasses.replace(LONG, newest=False)  # each chunk by its own prompt
    distill_run.check(dataclasses.replace(made, prompts=inside, clips=apart))


@pytest.mark.parametrize("sizes", [(3, 4, 7), (3, 2, 2), (3, 0, 7), (3, 3, 7)])
def test_clips_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="next <"):
        Clips(*sizes)


def test_a_teacher_of_other_latents_is_refused(tmp_path, given):
    other = dataclasses.replace(SMALL, dit=dataclasses.replace(SMALL.dit, channels=8))
    other = dataclasses.replace(other, vae=dataclasses.replace(SMALL.vae, latent_channels=8))
    folder = training.write_model(tmp_path / "teacher", other)
    with pytest.raises(InputError, match="the teacher has 8 latent channels, the student 4"):
        Run(given(ONE, teacher=str(folder)), tmp_path / "run")


def test_a_lora_of_another_base_is_refused(tmp_path, given, model):
    run = Run(given(ONE), tmp_path)
    run.finish(run.train())
    with pytest.raises(InputError, match="the LoRA is of another model"):
        longlive_jax.load("tiny", lora=str(tmp_path / "lora.safetensors"))


# --- prompts --------------------------------------------------------------------------------------


def test_sequences_have_shots_or_a_switch(model, prompts):
    loaded, mesh = longlive_jax.load(str(model)), sharding.make_mesh()
    shots = next(Prompts(loaded, PromptConfig(str(prompts), 4, 2, shot=2), mesh))
    np.testing.assert_array_equal(shots.prompt, [[0, 0, 1, 1]] * 2)
    np.testing.assert_array_equal(shots.cut, [[False, False, True, False]] * 2)
    assert not shots.switch.any()
    made = Prompts(loaded, PromptConfig(str(prompts), 9, 2, switch=(2, 7, 2)), mesh)
    at = [int(np.argmax(row)) for _ in range(8) for row in next(made).switch]
    assert {*at} == {2, 4, 6}
    state = made.get_state()
    following = next(made)
    made.set_state(state)
    same(jax.tree.leaves(next(made)), jax.tree.leaves(following))


def test_sequences_begin_with_pictures(tmp_path, model):
    """Those of their lines, as sessions begin with them."""
    rng, loaded = np.random.default_rng(0), longlive_jax.load(str(model))
    told = []
    for name in ("one.png", "two.png"):
        picture = rng.integers(0, 256, (loaded.config.height, loaded.config.width, 3), np.uint8)
        still(tmp_path / name, picture)
        told.append(json.dumps({"prompts": [f"a picture, {name}"], "image": name}))
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(told))
    made = Prompts(loaded, PromptConfig(str(path), 3, 2), sharding.make_mesh())
    plot = next(made)
    for row in range(2):
        line = made.lines[row]
        expected = loaded.session(line.prompts[0], image=str(line.image)).given
        np.testing.assert_array_equal(plot.given[row : row + 1], expected)
    assert not np.array_equal(plot.given[0], plot.given[1])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no prompts"),
        ('["a",', "line 1: "),
        ("[3]", "line 1 is no list of prompts"),
        ('a\n["b", "c"]', "line 1 has no prompt to switch to"),
        ('{"prompts": ["a", "b"]}', 'line 1 is no object of "prompts" and "image"'),
        ('{"prompts": "a", "image": "here"}', "line 1: there is no picture .*here"),
        ('{"prompts": "a", "image": "prompts.txt"}', "line 1 is no list of prompts"),
        ('a\n{"prompts": ["a"], "image": "prompts.txt"}', "has lines with a picture, and lines"),
    ],
)
def test_bad_prompts_are_refused(tmp_path, model, text, message):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    loaded, mesh = longlive_jax.load(str(model)), sharding.make_mesh()
    with pytest.raises(InputError, match=message):
        Prompts(loaded, PromptConfig(str(path), 7, 1, switch=(2, 5, 1)), mesh)
