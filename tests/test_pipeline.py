"""Whole videos, chunk by chunk, against LongLive 2.0's pipeline."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import streams
import wan

from longlive_jax import sampler
from longlive_jax.config import SamplerConfig, StreamConfig
from longlive_jax.dit import cache as slots

ATOL = 5e-4  # as the index says of every 08 case


def configs(facts) -> tuple[StreamConfig, SamplerConfig]:
    cfg, own = facts["config"], facts["config"]["inference"]
    stream = StreamConfig(
        cfg["num_frame_per_block"],
        window=own["local_attn_size"],
        sink=own.get("sink_size", 0),
        shot_offset=own.get("multi_shot_rope_offset", 0),
    )
    guidance = own.get("guidance_scale", 1.0)
    return stream, SamplerConfig("unipc", cfg["sampling_steps"], cfg["timestep_shift"], guidance)


def prompts(case, sampling, chunk):
    """One per row of the cache: those of the videos, then the negative one as often."""
    given = case["in/prompt_embeds"][:, chunk]
    negative = np.broadcast_to(case["in/negative_embeds"], given.shape)
    return jnp.asarray(np.concatenate([given, negative][: sampling.branches]))


@pytest.mark.parametrize(
    "name",
    [
        "08_pipeline_a_g1",
        "08_pipeline_b_cfg3",
        "08_pipeline_d_batch2",
        "08_pipeline_f_first_frame_t2v",
        "08_pipeline_j_8steps",
    ],
)
def test_latents(golden, facts, name):
    """d_batch2 cuts at its third chunk, a new shot; no pin is due within its four chunks."""
    case, dit = golden("longlive2", name), wan.longlive2("gen")
    facts = facts("longlive2", name)
    stream, sampling = configs(facts)
    logs = json.loads((wan.GOLDEN / "longlive2" / "attended.json").read_text()).get(name)
    noise = jnp.asarray(np.moveaxis(case["in/noise"], 2, -1))
    latents = np.moveaxis(case["out/latents"], 2, -1)
    video = streams.begin(dit, stream, sampling, batch=noise.shape[0])
    solver, start = sampler.make(sampling), 0
    for chunk, cut in enumerate(facts["config"]["scene_cut"]):
        first = chunk == 0 and facts["config"]["inference"].get("independent_first_frame")
        now = slice(start, start + (1 if first else stream.chunk))
        start = now.stop
        if cut:
            video = dataclasses.replace(video, shot=video.shot + 1)
        text = streams.text(dit, prompts(case, sampling, chunk))
        video, out = streams.denoise(
            dit,
            video,
            text,
            noise[:, now],
            stream=stream,
            solver=solver,
            guidance=sampling.guidance,
        )
        np.testing.assert_allclose(out, latents[:, now], atol=ATOL, err_msg=f"chunk {chunk}")
        if logs:  # the reference logs every step and the clean pass of a chunk
            log = logs[chunk * (sampling.steps + 1)]
            assert streams.attended(video.cache) == [log] * noise.shape[0]
        assert_holds(video, latents)
    assert start == latents.shape[1]


def assert_holds(video, latents):
    """A session keeps the latents of the frames in its cache, slot by slot."""
    for row, frames in enumerate(np.asarray(video.cache.frame[: video.shot.shape[0]])):
        for slot in np.flatnonzero(frames >= 0):
            held = slots.latents_of(video.held, video.cache.frame[: video.shot.shape[0]])[row, slot]
            np.testing.assert_allclose(held, latents[row, frames[slot]], atol=ATOL)
