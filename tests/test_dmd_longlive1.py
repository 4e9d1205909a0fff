"""What two scores make of a student's clip, and what student and critic learn from it, against
LongLive 1.0's, at the tolerances of the index.

The recorded files F_weights, G_dmd and G2_dmd_full are too large for tests/golden, where this looks
for them: it is run by hand.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streams
import wan
from flax import nnx

from longlive_jax import flow, sampler, sharding, weights
from longlive_jax.config import DiTConfig, SamplerConfig, StreamConfig, VAEConfig
from longlive_jax.convert import wan_dit, wan_vae
from longlive_jax.convert.table import export, fill
from longlive_jax.flow import Flow
from longlive_jax.train import dmd, self_forcing, sequence
from longlive_jax.train.dmd import DMDConfig, Prompts, Shown
from longlive_jax.train.self_forcing import Clip, Script, SelfForcing
from longlive_jax.train.sequence import Plot
from longlive_jax.vae.vae import VAE

GOLDEN = pathlib.Path(__file__).parent / "golden" / "longlive1"
WEIGHTS, PIECES, WHOLE = "F_weights", "G_dmd", "G2_dmd_full"
GENERATOR = DiTConfig(
    dim=64, ffn_dim=128, heads=2, layers=2, channels=4, text_dim=24, text_len=14, freq_dim=32
)
CRITIC = dataclasses.replace(GENERATOR, ffn_dim=96, layers=1)
TEACHER = dataclasses.replace(CRITIC, dim=80)
CHUNK = 3
SAMPLER = SamplerConfig("renoise", 4, 5.0, timesteps=(1000, 750, 500, 250))
ROLL = SelfForcing(StreamConfig(CHUNK, window=6, sink=3), sampler.make(SAMPLER), Flow(5.0))
# Scores look timesteps up in a table of shift 8, and see all frames at once.
JUDGE = DMDConfig(CHUNK, score_shift=8.0, causal=False, whole=True)
CHUNKS, JUDGED = 4, 9  # chunks at most; frames, the last of a clip
# Of the way from the text the reference, which keeps its keys and values, has no gradient.
TEXT = ("text_embedding.", "cross_attn.k.", "cross_attn.v.", "cross_attn.norm_k.")


@functools.cache
def read(case):
    with np.load(GOLDEN / f"{case}.npz") as file:
        return dict(file)


@functools.cache
def tolerances(case):
    return json.loads((GOLDEN / "index.json").read_text())["cases"][case]["tolerance"]


@functools.cache
def network(name, cfg):
    return wan.load(cfg, _named(f"w/{name}."))


def _named(prefix):
    return {k.removeprefix(prefix): x for k, x in read(WEIGHTS).items() if k.startswith(prefix)}


@functools.cache
def vae():
    given = read(WEIGHTS)
    statistics = {k: tuple(given[f"in/vae_{k}"].tolist()) for k in ("mean", "std")}
    strides = ((1, 2), (2, 2), (2, 2))
    cfg = VAEConfig(4, 4, 4, (1, 2, 4, 4), 1, strides, **statistics)
    abstract = nnx.eval_shape(lambda: VAE(cfg, rngs=nnx.Rngs(0)))
    return fill(abstract, wan_vae.rows(cfg), _named("w/vae."))


def scores():
    return network("real_score", TEACHER), network("fake_score", CRITIC)


@functools.cache
def mesh():
    return sharding.make_mesh()


def close(ours, case, name):
    atol = tolerances(case)[name]["atol"]
    ours = np.asarray(ours)
    np.testing.assert_allclose(ours, read(case)[name], atol=atol, rtol=0, err_msg=name)


def frames_last(x):
    """b f c h w -> b f h w c"""
    return jnp.asarray(np.moveaxis(x, 2, -1))


def frames_first(x):
    return np.moveaxis(np.asarray(x), -1, 2)


def prompts(batch):
    given, n = read(PIECES), JUDGED // CHUNK
    context = jnp.asarray(given["in/prompt_embeds"][:batch])
    negative = jnp.asarray(given["in/negative_embeds"][:batch])
    return Prompts(context[:, None], jnp.zeros((batch, n), jnp.int32), negative)


judge = functools.partial(streams.jit, static_argnames=("cfg", "mesh"))(dmd.gradient)
says = functools.partial(streams.jit, static_argnames=("cfg", "mesh"))(dmd.velocity)
sees = functools.partial(streams.jit, static_argnames=("cfg", "mesh"))(dmd.clean_of)
guided = functools.partial(streams.jit, static_argnames=("cfg", "mesh", "scale"))(dmd.guided)


def pieces():
    """A clip with noise on it, as the scores are shown it."""
    case = read(PIECES)
    clean, noisy = (frames_last(case[f"in/{k}"]) for k in ("estimated_clean", "noisy"))
    t = jnp.asarray(case["in/timestep"])
    return Shown(clean, noisy, jnp.zeros_like(noisy), t, jnp.ones(t.shape))


@pytest.mark.parametrize("name, score", [("real", 0), ("fake", 1)])
def test_what_a_score_says(name, score):
    seen, said, dit = pieces(), prompts(2), scores()[score]
    v = says(dit, seen.noisy, seen.t, said, cfg=JUDGE, mesh=mesh())
    close(frames_first(v), PIECES, f"out/{name}_flow")
    x0 = sees(dit, seen.noisy, seen.t, said=said, cfg=JUDGE, mesh=mesh())
    close(frames_first(x0), PIECES, f"out/{name}_x0")


def test_the_direction_without_a_normaliser():
    seen, said = pieces(), prompts(2)
    of_real, of_fake = (
        guided(dit, seen, said, cfg=JUDGE, mesh=mesh(), scale=scale)
        for dit, scale in zip(scores(), (JUDGE.real_guidance, JUDGE.fake_guidance), strict=True)
    )
    close(frames_first(of_fake - of_real), PIECES, "out/kl_grad_raw")
    close([jnp.abs(of_fake - of_real).mean()], PIECES, "out/kl_grad_raw_norm")


@pytest.mark.parametrize("name, fake", [("normalised", 0.0), ("fake_guidance", 0.7)])
def test_the_direction(name, fake):
    cfg, seen = dataclasses.replace(JUDGE, fake_guidance=fake), pieces()
    _, gradient, size = judge(*scores(), seen, prompts(2), cfg=cfg, mesh=mesh())
    close(frames_first(gradient * gradient.size), PIECES, f"out/kl_grad_{name}")
    close([size], PIECES, f"out/kl_grad_{name}_norm")


@pytest.mark.parametrize("name", ["masked", "unmasked", "ts_schedule"])
def test_the_loss_and_its_gradient(name):
    case = read(PIECES)
    draws = [case[f"in/loss_{name}_draws/{k}"] for k in ("000_randint", "001_randn_like")]
    counts = jnp.asarray(case["in/gradient_mask"][:, :, 0, 0, 0], jnp.float32)
    counts = counts if name == "masked" else None
    clean, t = (
        frames_last(case["in/estimated_clean"]),
        dmd.timesteps(jnp.asarray(draws[0]), JUDGE, JUDGED),
    )
    close(t, PIECES, f"out/loss_{name}_timestep")
    seen = dmd.show(clean, frames_last(draws[1]), t, JUDGE, counts)
    loss, gradient, _ = judge(*scores(), seen, prompts(2), cfg=JUDGE, mesh=mesh())
    close([loss], PIECES, f"out/loss_{name}")
    close(frames_first(gradient), PIECES, f"out/loss_{name}_grad_x")


def recorded(which):
    """The noise of a clip as it was drawn, of every chunk and step, clean passes last; how many
    chunks there are; the step at which they are left; the place of the timestep and the noise under
    which the clip is judged.
    """
    case = read(WHOLE)
    draws = [case[k] for k in sorted(case) if k.startswith(f"in/{which}_draws/")]
    length, noise, exits, *between, index, judged = draws
    chunks, exit_ = int(length[0]), int(exits[0])
    assert noise.shape[1] == chunks * CHUNK and len(between) == chunks * (exit_ + 1)
    first = noise.reshape(chunks, CHUNK, *noise.shape[2:])
    between = np.reshape(between, (chunks, exit_ + 1, *first.shape[1:]))
    table = np.zeros((CHUNKS, ROLL.steps + 1, *first.shape[1:]), np.float32)  # n steps f c h w
    table[:chunks, 0], table[:chunks, 1 : exit_ + 1] = first, between[:, :exit_]
    table[:chunks, ROLL.steps] = between[:, exit_]
    table = jnp.asarray(np.moveaxis(table, 3, -1))[:, :, None]
    return table, chunks, jnp.int32(exit_), jnp.asarray(index), frames_last(judged)


def drawing(table):
    """Of a rollout's chunk and step; a clean pass has the last step's number plus one."""
    return lambda memory, step: table[memory.chunk[0], step]


@streams.jit
def following(dit, memory, script, exit_, table):
    """One more chunk."""
    return self_forcing.roll(dit, memory, script, exit_[None], ROLL, drawing(table))


def rolled(table, chunks, exit_):
    """The script of a clip, the memory before each of its chunks, and the chunks."""
    said, never = prompts(1), jnp.zeros((1, chunks), bool)
    script = Script(said.context, jnp.zeros((1, chunks), jnp.int32), never, never)
    dit, made, before = network("generator", GENERATOR), [], []
    memory = streams.begin(dit, ROLL.stream, SAMPLER)
    for i in range(chunks):
        before.append(memory)
        memory, clip = following(dit, memory, script.at(i), exit_, table)
        made.append(clip)
    return script, before, made


def joined(clips):
    return Clip(
        jnp.concatenate([clip.latents for clip in clips], 1),
        jnp.concatenate([clip.inputs for clip in clips]),
        jnp.concatenate([clip.exits for clip in clips]),
    )


def pictured(memory, script, latents):
    """The last frames of a clip, the first of them encoded again as a picture. A sequence comes to
    the same where its first clip is as long as what is judged, and the next one brings the rest.
    """
    never, negative = script.cut, prompts(1).negative
    plot = Plot(script.context, negative, script.prompt, never, never)
    like = streams.model(network("generator", GENERATOR), ROLL.stream, SAMPLER)
    open_ = functools.partial(sequence.open_, cfg=dataclasses.replace(like, height=32, width=32))

    @streams.jit
    def run(vae, plot, memory, latents):
        begun = open_(vae, plot=plot, memory=memory, clip=latents[:, :JUDGED])
        return sequence.extend(vae, begun, memory, latents[:, JUDGED:])[1]

    return run(vae(), plot, memory, latents)


def learned(gradients, cfg, prefix, without=()):
    """All that has a gradient in the reference is as there; `without` has none there."""
    ours = export(gradients, wan_dit.rows(cfg))
    theirs = {k.removeprefix(prefix): x for k, x in read(WHOLE).items() if k.startswith(prefix)}
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        assert np.any(gradient) == (not any(part in name for part in without)), name
        if np.any(gradient):
            close(ours[name], WHOLE, prefix + name)
        else:
            assert np.any(ours[name]), name


def test_the_student_learns_as_theirs():
    """A clip of 12 frames, of which the last 9 are judged, and the last 6 count. The first chunk
    has no gradient, nor has what later ones keep of it: it is memory from before the clip.
    """
    table, chunks, exit_, index, noise = recorded("generator")
    script, before, made = rolled(table, chunks, exit_)
    whole, clip = joined(made), joined(made[1:])
    calls = frames_last(read(WHOLE)["out/generator_x0_calls"][:, 0])  # of each step, then clean
    calls = calls.reshape(chunks, -1, *calls.shape[1:])
    atol = tolerances(WHOLE)["out/generator_x0_calls"]["atol"]
    for i, by_step in enumerate(calls):
        np.testing.assert_allclose(made[i].latents[0], by_step[exit_], rtol=0, atol=atol)
        sigma = ROLL.flow.sigma(jnp.float32(ROLL.solver.steps[exit_].timestep))
        given = flow.corrupt(by_step[exit_ - 1], table[i, exit_, 0], sigma)
        np.testing.assert_allclose(made[i].inputs[0, 0], given, rtol=0, atol=atol)

    t = dmd.timesteps(index, JUDGE, JUDGED)
    close(t, WHOLE, "out/generator_timestep")
    counts = jnp.asarray(np.arange(JUDGED) >= CHUNK, jnp.float32)[None]
    shown = pictured(before[0], script, whole.latents)
    seen = dmd.show(shown, noise, t, JUDGE, counts)
    loss, cotangent, apart = judge(*scores(), seen, prompts(1), cfg=JUDGE, mesh=mesh())
    close([loss], WHOLE, "out/generator_loss")
    close([apart], WHOLE, "out/generator_gradient_norm")

    dit, own = network("generator", GENERATOR), dataclasses.replace(ROLL, through="straight")
    build = functools.partial(weights.unflatten, dit)
    of = Script(script.context, script.prompt[:, 1:], script.cut[:, 1:], script.switch[:, 1:])
    run = lambda flat: self_forcing.gradient(  # noqa: E731
        build, flat, before[1], of, clip, cotangent, own, drawing(table)
    )
    gradients = build(streams.jit(run)(weights.flatten(dit)))
    learned(gradients, GENERATOR, "out/generator_grad/", without=TEXT)


def test_the_critic_learns_as_theirs():
    """A clip of 9 frames, all of which are judged, and count."""
    table, chunks, exit_, index, noise = recorded("critic")
    clip = joined(rolled(table, chunks, exit_)[-1])
    t = dmd.timesteps(index, JUDGE, JUDGED)
    close(t, WHOLE, "out/critic_timestep")
    seen, fake = dmd.show(clip.latents, noise, t, JUDGE), network("fake_score", CRITIC)
    build = functools.partial(weights.unflatten, fake)
    run = lambda flat: dmd.critic_loss(build(flat), seen, prompts(1), JUDGE, mesh())  # noqa: E731
    loss, gradients = streams.jit(jax.value_and_grad(run))(weights.flatten(fake))
    close([loss], WHOLE, "out/critic_loss")
    learned(build(gradients), CRITIC, "out/critic_grad/")
