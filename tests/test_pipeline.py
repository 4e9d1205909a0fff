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

CASES = [
    "08_pipeline_a_g1",
    "08_pipeline_b_cfg3",
    "08_pipeline_c_multishot",
    "08_pipeline_c2_multishot_cfg",
    "08_pipeline_c3_clean_recache",
    "08_pipeline_d_batch2",
    "08_pipeline_e_i2v",
    "08_pipeline_e2_i2v_cfg",
    "08_pipeline_f_first_frame_t2v",
    "08_pipeline_g_extension",
    "08_pipeline_h_relative",
    "08_pipeline_i_tscale_2steps",
    "08_pipeline_j_8steps",
]
ATOL = 5e-4  # as the index says of every 08 case


def configs(cfg) -> tuple[StreamConfig, SamplerConfig]:
    own, top, chunk = cfg["inference"], cfg["top"], cfg["num_frame_per_block"]
    sink = own.get("sink_size", 0)
    stream = StreamConfig(
        chunk,
        # No size is three chunks, not all there is.
        window=own["local_attn_size"] if own["local_attn_size"] > 0 else 3 * chunk,
        sink=sink,
        shot_sink=sink if own.get("multi_shot_sink") else 0,
        shot_offset=own.get("multi_shot_rope_offset", 0),
        rope="relative" if top.get("use_relative_rope") else "absolute",
        time_scale=top.get("inference_t_scale", 1.0),
        clean_recache=own.get("shot_clean_recache", False),
    )
    guidance = own.get("guidance_scale", 1.0)
    return stream, SamplerConfig("unipc", cfg["sampling_steps"], cfg["timestep_shift"], guidance)


def prompts(case, sampling, chunk):
    """One per row of the cache: those of the videos, then the negative one as often."""
    given = case["in/prompt_embeds"][:, chunk]
    negative = np.broadcast_to(case["in/negative_embeds"], given.shape)
    return jnp.asarray(np.concatenate([given, negative][: sampling.branches]))


def channel_last(x):
    return jnp.asarray(np.moveaxis(x, 2, -1))  # b f c h w -> b f h w c


@pytest.mark.parametrize("name", CASES)
def test_latents(golden, facts, name):
    case, dit = golden("longlive2", name), wan.longlive2("gen")
    cfg = facts("longlive2", name)["config"]
    stream, sampling = configs(cfg)
    logs = json.loads((wan.GOLDEN / "longlive2" / "attended.json").read_text()).get(name)
    noise, latents = channel_last(case["in/noise"]), np.moveaxis(case["out/latents"], 2, -1)
    known = channel_last(case["in/initial_latent"]) if "in/initial_latent" in case else None
    video = streams.begin(dit, stream, sampling, batch=noise.shape[0])
    choices = dict(stream=stream, solver=sampler.make(sampling), guidance=sampling.guidance)
    one_first = cfg["inference"].get("independent_first_frame") and known is None
    start = before = 0
    if known is not None and known.shape[1] == stream.chunk:
        # The reference gives all prompts to the chunk that comes first, each to its own tokens.
        stacked = wan.prompts(dit, case["in/prompt_embeds"][0], noise.shape[0])
        video = streams.absorb(dit, video, stacked, known, stream=stream)
        assert streams.attended(video.cache) == [logs[0]]
        known, before, logs = None, stream.chunk, logs[1:]
    for chunk, cut in enumerate(cfg["scene_cut"]):
        now = slice(start, start + (1 if one_first and not chunk else stream.chunk))
        start = now.stop
        if cut:
            video = dataclasses.replace(video, shot=video.shot + 1)
        text = streams.text(dit, prompts(case, sampling, chunk))
        entered, given = enter(video, stream, now.stop - now.start), None if chunk else known
        inputs = dit, video, text, noise[:, now], None, given
        video, out = streams.denoise(*inputs, **choices)
        theirs = latents[:, now.start + before : now.stop + before]
        np.testing.assert_allclose(out, theirs, atol=ATOL, err_msg=f"chunk {chunk}")
        if logs:  # every step and the clean pass of a chunk
            *steps, clean = logs[chunk * (sampling.steps + 1) : (chunk + 1) * (sampling.steps + 1)]
            assert [streams.attended(entered)] * sampling.steps == [[s] * len(out) for s in steps]
            assert streams.attended(video.cache) == [clean] * len(out)
        assert_holds(video, latents)
    assert start + before == latents.shape[1]


def enter(video, stream, frames):
    """The cache as the steps of the next chunk of one video or more (all alike) see it."""
    labels = (x[0] for x in (video.frame, video.chunk, video.shot))
    sinks = dict(sink=stream.sink, shot_sink=stream.shot_sink)
    return streams.claim(video.cache, *labels, frames=frames, **sinks)[1]


def assert_holds(video, latents):
    """A session keeps the latents of the frames in its cache, slot by slot."""
    for row, frames in enumerate(np.asarray(video.cache.frame[: video.shot.shape[0]])):
        for slot in np.flatnonzero(frames >= 0):
            held = slots.latents_of(video.held, video.cache.frame[: video.shot.shape[0]])[row, slot]
            np.testing.assert_allclose(held, latents[row, frames[slot]], atol=ATOL)
