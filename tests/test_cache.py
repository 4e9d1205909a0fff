"""The slot cache against the references' rolling caches, call by call."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import streams
import wan

from longlive_jax.config import StreamConfig
from longlive_jax.dit import cache as slots
from longlive_jax.flow import Flow

CASES = [
    "06_kv_a_nosink",
    "06_kv_a2_first_frame",
    "06_kv_b_sink_chunk",
    "06_kv_b2_sink_one_frame",
    "06_kv_b3_sink_prepended",
    "06_kv_d2_tscale",
    "06_kv_f_local_minus1",
]
ATOL = 1e-4  # as the index says of every 06 case


def layout(cfg) -> StreamConfig:
    """What a reference's cache and attention sizes amount to."""
    window = min(cfg["cache_frames"], cfg["max_attention_tokens"] // cfg["tokens_per_frame"])
    return StreamConfig(cfg["num_frame_per_block"], window, cfg["sink_size_frames"])


def calls(case):
    """x, t, flow, x0 of every call; a first chunk of another length has arrays of its own."""
    names = ("in/x", "in/t", "out/flow", "out/x0")
    parts = [part for part in ("_first", "") if "in/x" + part in case]
    return [row for part in parts for row in zip(*(case[n + part] for n in names), strict=True)]


def channel_last(x):
    return np.moveaxis(x, -3, -1)  # b f c h w -> b f h w c


@pytest.mark.parametrize("name", CASES)
def test_every_call(golden, facts, name):
    case, cfg, dit = (
        golden("longlive2", name),
        facts("longlive2", name)["config"],
        wan.longlive2("gen"),
    )
    log = json.loads((wan.GOLDEN / "longlive2" / "attended.json").read_text())[name]
    stream, per_chunk = layout(cfg), len(cfg["denoise_timesteps"]) + 1
    offsets = cfg["rope_offset_per_chunk"] or [0] * cfg["chunks"]
    cache, start, rows = slots.empty(dit.cfg, stream, cfg["B"], streams.TOKENS), 0, calls(case)
    assert len(rows) == len(log) == per_chunk * cfg["chunks"]
    for number, (x, t, flow, x0) in enumerate(rows):
        chunk, frames = number // per_chunk, x.shape[1]
        if number % per_chunk == 0:
            new = jnp.int32(start), jnp.int32(chunk)
            taken, cache = streams.claim(cache, *new, frames=frames, sink=stream.sink)
            text = streams.text(dit, jnp.asarray(case["in/context"][chunk]))
            position = (start + np.arange(frames) + offsets[chunk]) * cfg["t_scale"]
            position = jnp.broadcast_to(jnp.float32(position), (cfg["B"], frames))
            start += frames
        assert streams.attended(cache) == [log[number]] * cfg["B"]
        x, t = jnp.asarray(channel_last(x)), jnp.asarray(t)
        v, cache = streams.call(dit, cache, taken, cache.filled, position, x, t, text)
        np.testing.assert_allclose(v, channel_last(flow), atol=ATOL, err_msg=f"call {number}")
        np.testing.assert_allclose(Flow(5.0).to_x0(v, x, t), channel_last(x0), atol=ATOL)
    _check_block0(case, cache)


def _check_block0(case, cache):
    """The first block's keys and values of every frame that we hold."""
    frames = case["out/slot_frame"].reshape(-1, streams.TOKENS)[:, 0].tolist()
    for row in range(cache.frame.shape[0]):
        for name, ours in (("k", cache.k), ("v", cache.v)):
            theirs = case[f"out/{name}_block0"][row].reshape(len(frames), streams.TOKENS, 2, 32)
            for frame, value in streams.by_frame(cache, ours, row).items():
                np.testing.assert_allclose(value[0], theirs[frames.index(frame)], atol=ATOL)
