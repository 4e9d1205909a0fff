"""Clips that a model makes for itself, and the gradient through them, against LongLive's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streams
import wan

from longlive_jax import sampler, weights
from longlive_jax.config import SamplerConfig, StreamConfig
from longlive_jax.convert import wan_dit
from longlive_jax.convert.table import export
from longlive_jax.flow import Flow
from longlive_jax.train import self_forcing
from longlive_jax.train.self_forcing import Clip, Script, SelfForcing

CHUNK = 2
UNIPC = SamplerConfig("unipc", 4, 5.0)
CASES = ["a_exit1", "a2_exit3", "b_mixed", "d_i2v", "f_context_noise"]
ATOL = 5e-4  # as the index says of every 09 case; gradients: 2e-3 of the largest


def frames_last(x):
    """b f c h w -> b f h w c"""
    return jnp.asarray(np.moveaxis(x, 2, -1))


def how(cfg, **changes) -> SelfForcing:
    sink = cfg.get("sink_size", 0)
    stream = StreamConfig(
        CHUNK,
        window=cfg.get("local_attn_size", 12),
        sink=sink,
        shot_sink=sink if cfg.get("multi_shot_sink") else 0,
        shot_offset=int(cfg.get("multi_shot_rope_offset", 0)),
    )
    context_t = float(cfg.get("context_noise", 0))
    return SelfForcing(stream, sampler.make(UNIPC), Flow(5.0), context_t, **changes)


def recorded(case, chunks):
    """The noise that the reference drew: at the start, and at the clean pass."""
    noise = frames_last(case["in/noise"])
    b = noise.shape[0]
    names = sorted(name for name in case if name.startswith("in/draw"))
    clean = np.stack([np.moveaxis(case[name], 1, -1) for name in names])  # n bf h w c
    table = jnp.stack(
        [
            jnp.moveaxis(noise.reshape(b, chunks, -1, *noise.shape[2:]), 1, 0),
            jnp.asarray(clean).reshape(chunks, b, -1, *noise.shape[2:]),
        ]
    )
    return lambda memory, step: table[jnp.where(jnp.asarray(step) == 0, 0, 1), memory.chunk[0]]


def script(case, cfg, batch, chunks):
    context = case["in/prompt_embeds"]
    context = jnp.asarray(context.reshape(batch, -1, *context.shape[1:]))
    which = np.minimum(np.arange(chunks), context.shape[1] - 1).astype(np.int32)
    prompt = jnp.broadcast_to(jnp.asarray(which), (batch, chunks))
    cut = jnp.asarray([cfg.get("scene_cut_mask") or [False] * chunks] * batch)
    given = frames_last(case["in/initial_latent"]) if "in/initial_latent" in case else None
    return Script(context, prompt, cut, jnp.zeros_like(cut), given)


@dataclasses.dataclass(frozen=True)
class Played:
    """A clip of a golden case, and everything that it was made of."""

    dit: object
    memory: object
    script: Script
    cfg: SelfForcing
    draw: object
    clip: Clip

    def build(self, flat):
        return weights.unflatten(self.dit, flat)

    def gradient(self, cotangent, **changes):
        cfg = dataclasses.replace(self.cfg, **changes)
        flat = weights.flatten(self.dit)

        def run(flat):
            inputs = self.memory, self.script, self.clip, cotangent, cfg, self.draw
            return self_forcing.gradient(self.build, flat, *inputs)

        made = streams.jit(run)(flat)
        return export(weights.unflatten(self.dit, made), wan_dit.rows(self.dit.cfg))


def play(golden, facts, name) -> Played:
    name = f"09_selfforcing_{name}"
    case, cfg = golden("longlive2", name), facts("longlive2", name)["config"]
    dit, exits = wan.longlive2("gen"), jnp.asarray(cfg["exit_flags"], jnp.int32)
    b, chunks = case["in/noise"].shape[0], len(exits)
    own, told = how(cfg), script(case, cfg, b, chunks)
    memory, draw = streams.begin(dit, own.stream, UNIPC, batch=b), recorded(case, chunks)
    roll = lambda dit, memory: self_forcing.roll(dit, memory, told, exits, own, draw)  # noqa: E731
    _, clip = streams.jit(roll)(dit, memory)
    return Played(dit, memory, told, own, draw, clip)


def close(found, case, prefix):
    expected = {k.removeprefix(prefix): g for k, g in case.items() if k.startswith(prefix)}
    assert len(expected) == 4
    for name, gradient in expected.items():
        bound = 2e-3 * np.abs(gradient).max()
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_clips_and_gradients(golden, facts, name):
    """Of every parameter that is recorded, through a memory with and without a gradient."""
    case = golden("longlive2", f"09_selfforcing_{name}")
    played = play(golden, facts, name)
    np.testing.assert_allclose(played.clip.latents, frames_last(case["out/latents"]), atol=ATOL)
    cotangent = frames_last(case["in/cotangent"])
    close(played.gradient(cotangent), case, "out/grad_detached_cache/")
    close(played.gradient(cotangent, through="straight"), case, "out/grad/")
