"""What two scores make of a student's clip, against LongLive 2.0's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streams
import wan
from flax import nnx

from longlive_jax import sampler, sharding, weights
from longlive_jax.config import SamplerConfig, StreamConfig
from longlive_jax.convert import wan_dit
from longlive_jax.convert.table import export
from longlive_jax.dit.model import DiT
from longlive_jax.errors import InputError
from longlive_jax.flow import Flow
from longlive_jax.train import dmd, self_forcing
from longlive_jax.train.dmd import DMDConfig, Prompts
from longlive_jax.train.self_forcing import Script, SelfForcing

CASES = {
    "a_causal": {},
    "a2_causal_b2_fakecfg": dict(fake_guidance=1.5, real_guidance=2.0),
    "b_mask": {},
    # Its bidirectional models look timesteps up in a table of shift 8.
    "c_bidirectional": dict(causal=False, score_shift=8.0),
    "d_i2v": dict(per_chunk=True),
    "e_first_frame_normalizer": dict(first=1),
    "f_ts_schedule": dict(within="both"),
    "g_teacher_forcing": {},
}


def frames_last(x):
    """b f c h w -> b f h w c"""
    return jnp.asarray(np.moveaxis(x, 2, -1))


@functools.cache
def mesh():
    return sharding.make_mesh()


def prompts(case, batch, chunks):
    context = jnp.asarray(
        case["in/prompt_embeds"].reshape(batch, -1, *case["in/prompt_embeds"].shape[1:])
    )
    which = np.minimum(np.arange(chunks), context.shape[1] - 1).astype(np.int32)
    before = frames_last(case["in/clean_x"]) if "in/clean_x" in case else None
    return Prompts(
        context,
        jnp.broadcast_to(jnp.asarray(which), (batch, chunks)),
        jnp.asarray(case["in/negative_embeds"]),
        before,
    )


def shown(case, cfg, clip, index, noise):
    """The clip of a case as it is judged. A picture that is given takes its first frame's place."""
    t = dmd.timesteps(index, cfg, clip.shape[1])
    known = None
    if "in/initial_latent" in case:
        clip = clip.at[:, :1].set(frames_last(case["in/initial_latent"]))
        known = jnp.arange(clip.shape[1]) == 0
    counts = None
    if "in/gradient_mask" in case:
        counts = jnp.asarray(case["in/gradient_mask"][:, :, 0, 0, 0], jnp.float32)
    return dmd.show(clip, noise, t, cfg, counts, known)


def drawn(case, cfg, first=0):
    """The timestep and the noise that the reference drew."""
    index = jnp.asarray(case[f"in/draw_{first:02d}_randint"].astype(np.int32))
    noise = case[f"in/draw_{first + 1:02d}_randn_like"]
    chunks = len(cfg.spans(noise.shape[1]))
    # Of every frame: of a clip the first, of chunks their first.
    step = [start for start, _ in cfg.spans(noise.shape[1])] if cfg.per_chunk else [0]
    return index[:, jnp.array(step[: max(1, chunks)])], frames_last(noise)


judge = functools.partial(streams.jit, static_argnames=("cfg", "mesh"))(dmd.gradient)


@pytest.mark.parametrize("name", CASES)
def test_direction_and_loss(golden, name):
    case, cfg = golden("longlive2", f"10_dmd_{name}"), DMDConfig(2, **CASES[name])
    clip = frames_last(case["in/image_or_video"])
    index, noise = drawn(case, cfg)
    seen = shown(case, cfg, clip, index, noise)
    said = prompts(case, clip.shape[0], len(cfg.spans(clip.shape[1])))
    np.testing.assert_allclose(seen.t, case["out/timestep"], rtol=1e-6)
    np.testing.assert_allclose(seen.noisy, frames_last(case["out/noisy_latent"]), atol=1e-5)
    real, fake = wan.longlive2("real"), wan.longlive2("fake")
    loss, gradient, size = judge(real, fake, seen, said, cfg=cfg, mesh=mesh())
    np.testing.assert_allclose(loss, case["out/loss"][0], rtol=1e-4)
    numel = float(np.broadcast_to(seen.counts[:, :, None, None, None], clip.shape).sum())
    theirs = frames_last(case["out/grad_image_or_video"])
    np.testing.assert_allclose(gradient * numel, theirs * numel, atol=1e-3)
    np.testing.assert_allclose(size, case["out/dmdtrain_gradient_norm"][0], rtol=1e-4)


UNIPC = SamplerConfig("unipc", 4, 5.0)
STREAM = StreamConfig(2, window=12, sink=0)  # the memory is not full before a clip ends
ROLL = SelfForcing(STREAM, sampler.make(UNIPC), Flow(5.0))


def rolled(case, facts, name):
    """The clip of an end-to-end case, made with the recorded noise, and all that it takes."""
    cfg, dit = facts("longlive2", name)["config"], wan.longlive2("gen")
    noise = frames_last(case["in/draw_00_randn"])
    exit_ = int(case["in/draw_02_randint"][0])
    chunks = noise.shape[1] // 2
    clean = [case[f"in/draw_{3 + i:02d}_randn_like"] for i in range(chunks)]
    clean = jnp.asarray(np.moveaxis(np.stack(clean), 2, -1))[:, None]  # n b f h w c
    table = jnp.stack([jnp.moveaxis(noise.reshape(1, chunks, 2, *noise.shape[2:]), 1, 0), clean])
    draw = lambda memory, step: table[jnp.where(jnp.asarray(step) == 0, 0, 1), memory.chunk[0]]  # noqa: E731
    said = prompts(case, 1, chunks)
    given = frames_last(case["in/initial_latent"]) if "in/initial_latent" in case else None
    cut = jnp.asarray([cfg["scene_cut_mask"]])
    script = Script(said.context, said.prompt, cut, jnp.zeros_like(cut), given)
    memory = streams.begin(dit, STREAM, UNIPC)
    exits = jnp.full(chunks, exit_, jnp.int32)
    roll = lambda dit, memory: self_forcing.roll(dit, memory, script, exits, ROLL, draw)[1]  # noqa: E731
    clip = streams.jit(roll)(dit, memory)
    np.testing.assert_allclose(clip.latents, frames_last(case["out/generated"]), atol=5e-4)
    return dit, memory, script, clip, draw, said


def close(ours, case, prefix):
    expected = {k.removeprefix(prefix): g for k, g in case.items() if k.startswith(prefix)}
    assert len(expected) == 3
    for name, gradient in expected.items():
        bound = 5e-3 * np.abs(gradient).max()
        np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("name", ["10_dmd_h_generator_loss", "10_dmd_j_generator_loss_i2v"])
def test_the_student_learns_as_theirs(golden, facts, name):
    """From noise to gradients, through a memory with and without a gradient."""
    case, cfg = golden("longlive2", name), DMDConfig(2, per_chunk="i2v" in name)
    dit, memory, script, clip, draw, said = rolled(case, facts, name)
    index, noise = drawn(case, cfg, 3 + script.chunks)
    seen = shown(case, cfg, clip.latents, index, noise)
    np.testing.assert_allclose(seen.t, case["out/timestep"], rtol=1e-6)
    real, fake = wan.longlive2("real"), wan.longlive2("fake")
    loss, cotangent, _ = judge(real, fake, seen, said, cfg=cfg, mesh=mesh())
    np.testing.assert_allclose(loss, case["out/loss"][0], rtol=1e-4)
    build = functools.partial(weights.unflatten, dit)
    for through, prefix in (("stop", "out/grad_detached_cache/"), ("straight", "out/grad/")):
        own = dataclasses.replace(ROLL, through=through)
        run = functools.partial(self_forcing.gradient, cfg=own, draw=draw)
        made = streams.jit(lambda flat, run=run: run(build, flat, memory, script, clip, cotangent))
        gradients = weights.unflatten(dit, made(weights.flatten(dit)))
        close(export(gradients, wan_dit.rows(dit.cfg)), case, prefix)


@pytest.mark.parametrize("name", ["10_dmd_i_critic_loss", "10_dmd_k_critic_loss_i2v"])
def test_the_critic_learns_as_theirs(golden, facts, name):
    case, cfg = golden("longlive2", name), DMDConfig(2, per_chunk="i2v" in name)
    *_, script, clip, _, said = rolled(case, facts, name)
    index, noise = drawn(case, cfg, 3 + script.chunks)
    seen, fake = shown(case, cfg, clip.latents, index, noise), wan.longlive2("fake")

    @streams.jit
    def run(flat):
        loss = lambda flat: dmd.critic_loss(  # noqa: E731
            weights.unflatten(fake, flat), seen, said, cfg, mesh()
        )
        return jax.value_and_grad(loss)(flat)

    loss, gradients = run(weights.flatten(fake))
    np.testing.assert_allclose(loss, case["out/loss"][0], rtol=1e-4)
    made = export(weights.unflatten(fake, gradients), wan_dit.rows(fake.cfg))
    close(made, case, "out/grad/")


def test_a_score_of_other_latents_is_refused():
    student = wan.longlive2("gen")
    other = dataclasses.replace(student.cfg, channels=16)
    teacher = nnx.eval_shape(lambda: DiT(other, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match="the teacher has 16 latent channels, the student 4"):
        dmd.check(student, teacher, "teacher")
