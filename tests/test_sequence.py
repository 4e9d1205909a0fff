"""Streaming long tuning against LongLive 1.0: clips of one running video, what is judged of them,
and the gradients, at the tolerances of the index.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import streams
import wan
from flax import nnx

from longlive_jax import sampler, sharding, weights
from longlive_jax.config import DiTConfig, SamplerConfig, StreamConfig, VAEConfig
from longlive_jax.convert import wan_dit, wan_vae
from longlive_jax.convert.table import export, fill
from longlive_jax.flow import Flow
from longlive_jax.train import dmd, self_forcing, sequence
from longlive_jax.train.dmd import DMDConfig
from longlive_jax.train.self_forcing import Clip, SelfForcing
from longlive_jax.train.sequence import Plot
from longlive_jax.vae.vae import VAE

WEIGHTS, F1, F3, G = "F_weights", "F1_streaming_rollout", "F3_cache_gradient", "G_dmd"
GENERATOR = DiTConfig(
    dim=64, ffn_dim=128, heads=2, layers=2, channels=4, text_dim=24, text_len=14, freq_dim=32
)
CRITIC = dataclasses.replace(GENERATOR, ffn_dim=96, layers=1)
TEACHER = dataclasses.replace(CRITIC, dim=80)
CHUNK = 3
SAMPLER = SamplerConfig("renoise", 4, 5.0, timesteps=(1000, 750, 500, 250))
# The memory of the reference is larger than a window that is attended, and so never full.
ROLL = SelfForcing(StreamConfig(CHUNK, window=12, sink=3), sampler.make(SAMPLER), Flow(5.0))
# Scores look timesteps up in a table of shift 8, and see all frames at once.
JUDGE = DMDConfig(CHUNK, score_shift=8.0, causal=False, whole=True)


@functools.cache
def read(case):
    with np.load(wan.GOLDEN / "longlive1" / f"{case}.npz") as file:
        return dict(file)


@functools.cache
def network(name, cfg):
    given = {k.removeprefix(f"w/{name}."): x for k, x in read(WEIGHTS).items()}
    return wan.load(cfg, {k: x for k, x in given.items() if not k.startswith(("w/", "in/"))})


@functools.cache
def vae():
    given = read(WEIGHTS)
    statistics = {k: tuple(given[f"in/vae_{k}"].tolist()) for k in ("mean", "std")}
    strides = ((1, 2), (2, 2), (2, 2))
    cfg = VAEConfig(4, 4, 4, (1, 2, 4, 4), 1, strides, **statistics)
    abstract = nnx.eval_shape(lambda: VAE(cfg, rngs=nnx.Rngs(0)))
    tensors = {k.removeprefix("w/vae."): x for k, x in given.items() if k.startswith("w/vae.")}
    return fill(abstract, wan_vae.rows(cfg), tensors)


def close(ours, case, name):
    index = json.loads((wan.GOLDEN / "longlive1" / "index.json").read_text())
    atol = index[case]["tolerance"][name]["atol"]
    np.testing.assert_allclose(ours, read(case)[name], atol=atol, rtol=0, err_msg=name)


def frames_last(x):
    """b f c h w -> b f h w c"""
    return jnp.asarray(np.moveaxis(x, 2, -1))


def frames_first(x):
    return np.moveaxis(np.asarray(x), -1, 2)


def recorded(case, call, exit_):
    """The noise of a clip as it was drawn: at its start, between steps, at clean passes. Then the
    timestep and the noise under which it is judged.
    """
    draws = [case[k] for k in sorted(case) if k.startswith(f"in/call{call}/draws/")]
    noise, _, *between = draws[:-2]
    noise, chunks = frames_last(noise), noise.shape[1] // CHUNK
    first = jnp.moveaxis(noise.reshape(1, chunks, CHUNK, *noise.shape[2:]), 1, 0)
    between = jnp.asarray(np.moveaxis(np.stack(between), 2, -1))[:, None]  # n b f h w c
    between = between.reshape(chunks, exit_ + 1, *between.shape[1:])
    return first, between, jnp.asarray(draws[-2].astype(np.int32)), frames_last(draws[-1])


def drawing(first, between, exit_, start):
    """Of a rollout's chunk and step; a clean pass has the last step's number plus one."""

    def draw(memory, step):
        chunk, step = memory.chunk[0] - start, jnp.asarray(step)
        place = jnp.where(step == ROLL.steps, exit_, jnp.maximum(step - 1, 0))
        return jnp.where(step == 0, first[chunk], between[chunk, place])

    return draw


def plot(chunks):
    given = read(WEIGHTS)
    context = jnp.asarray(given["in/prompt_embeds"])[:, None]
    never = jnp.zeros((1, chunks), bool)
    negative = jnp.asarray(given["in/negative_prompt_embeds"])
    return Plot(context, negative, jnp.zeros((1, chunks), jnp.int32), never, never)


@functools.cache
def clips():
    """The first two clips of the case: 7 chunks, then 6 more, left at steps 2 and 1."""
    case, dit, told = read(F1), network("generator", GENERATOR), plot(13)
    memory, made, start = streams.begin(dit, ROLL.stream, SAMPLER), [], 0
    for call, (exit_, chunks) in enumerate([(2, 7), (1, 6)]):
        first, between, *judged = recorded(case, call, exit_)
        draw = drawing(first, between, exit_, start)
        script = told.script(jnp.int32(start), chunks)
        exits = jnp.full(chunks, exit_, jnp.int32)
        roll = lambda dit, m, s=script, e=exits, d=draw: self_forcing.roll(dit, m, s, e, ROLL, d)  # noqa: E731
        after, clip = streams.jit(roll)(dit, memory)
        made.append((memory, script, clip, draw, judged, after))
        memory, start = after, start + chunks
    return told, made


def shown(latents, new, judged):
    index, noise = judged
    return dmd.show(latents, noise, dmd.timesteps(index, JUDGE, 21), JUDGE, new)


def test_the_first_clip_and_its_gradients():
    """Of all parameters, through a memory with a gradient, the way to the text included."""
    told, made = clips()
    memory, script, clip, draw, judged, _ = made[0]
    close(frames_first(clip.latents), F1, "out/call0/chunk")
    seen, said = shown(clip.latents, jnp.ones((1, 21)), judged), told.prompts(jnp.int32(0), 7, True)
    close(np.asarray(seen.t), F1, "out/call0/dmd_timestep")
    real, fake = network("real_score", TEACHER), network("fake_score", CRITIC)
    judge = functools.partial(dmd.gradient, cfg=JUDGE, mesh=sharding.make_mesh())
    loss, cotangent, apart = streams.jit(judge)(real, fake, seen, said)
    close([loss], F1, "out/call0/loss")
    close([apart], F1, "out/call0/dmdtrain_gradient_norm")
    dit, own = network("generator", GENERATOR), dataclasses.replace(ROLL, through="straight")
    build = functools.partial(weights.unflatten, dit)
    run = lambda flat: self_forcing.gradient(  # noqa: E731
        build, flat, memory, script, clip, cotangent, own, draw
    )
    gradients = build(streams.jit(run)(weights.flatten(dit)))
    ours = export(gradients, wan_dit.rows(GENERATOR))
    names = [name for name in read(F1) if name.startswith("out/call0/grad/")]
    assert len(names) >= 8
    for name in names:
        close(ours[name.removeprefix("out/call0/grad/")], F1, name)


def test_the_next_clip_begins_with_a_picture():
    """Three frames of the clip before, the first decoded and encoded again, and 18 new ones; the
    critic's loss and gradients of these.
    """
    told, made = clips()
    size = dict(height=32, width=32)
    config = dataclasses.replace(streams.model(GENERATOR_LIKE, ROLL.stream, SAMPLER), **size)
    begun = streams.jit(functools.partial(sequence.open_, cfg=config))(
        vae(), plot=told, memory=made[0][-1], clip=made[0][2].latents
    )
    follow, latents, new = streams.jit(sequence.extend)(
        vae(), begun, made[1][-1], made[1][2].latents
    )
    close(frames_first(latents), F1, "out/call1/chunk")
    close(frames_first(follow.latents), F1, "out/call1/previous_frames")
    np.testing.assert_array_equal(new[0] > 0, read(F1)["out/call1/gradient_mask_frames"] > 0)
    seen, said = shown(latents, new, made[1][4]), told.prompts(jnp.int32(6), 7, True)
    fake, mesh = network("fake_score", CRITIC), sharding.make_mesh()
    build = functools.partial(weights.unflatten, fake)
    run = lambda flat: dmd.critic_loss(build(flat), seen, said, JUDGE, mesh)  # noqa: E731
    loss, gradients = streams.jit(jax.value_and_grad(run))(weights.flatten(fake))
    close([loss], F1, "out/call1/loss")
    ours = export(build(gradients), wan_dit.rows(CRITIC))
    names = [name for name in read(F1) if name.startswith("out/call1/grad/")]
    assert len(names) >= 4
    for name in names:
        close(ours[name.removeprefix("out/call1/grad/")], F1, name)


@dataclasses.dataclass(frozen=True)
class _Like:
    cfg: DiTConfig


GENERATOR_LIKE = _Like(GENERATOR)


def test_the_memory_carries_a_gradient_between_chunks():
    """Of each chunk's output with respect to the noise that all were made of, at the first step."""
    case, dit = read(F3), network("generator", GENERATOR)
    noise, cotangent = frames_last(case["in/noise"]), frames_last(case["in/cotangent"])
    draws = [case[k] for k in sorted(case) if k.startswith("in/draws")]
    clean = jnp.asarray(np.moveaxis(np.stack(draws[-3:]), 2, -1))[:, None]
    first = jnp.moveaxis(noise.reshape(1, 3, CHUNK, *noise.shape[2:]), 1, 0)
    draw = drawing(first, clean[:, None], 0, 0)
    memory, script = streams.begin(dit, ROLL.stream, SAMPLER), plot(3).script(jnp.int32(0), 3)
    exits = jnp.zeros(3, jnp.int32)
    roll = lambda dit, memory: self_forcing.roll(dit, memory, script, exits, ROLL, draw)[1]  # noqa: E731
    clip = streams.jit(roll)(dit, memory)
    close(frames_first(clip.latents), F3, "out/chunk")
    own = dataclasses.replace(ROLL, through="straight")

    @streams.jit
    def of_noise(inputs, cotangent):
        again = lambda x: self_forcing.replay(  # noqa: E731
            lambda dit: dit, dit, memory, script, Clip(clip.latents, x, exits), own, draw
        )
        return jax.vjp(again, inputs)[1](cotangent)[0]

    rows = []
    for i in range(3):
        part = slice(i * CHUNK, (i + 1) * CHUNK)
        only = jnp.zeros_like(cotangent).at[:, part].set(cotangent[:, part])
        rows.append(frames_first(self_forcing._joined(of_noise(clip.inputs, only))))
    close(np.stack(rows), F3, "out/grad_noise_ckpt")
