"""The transformer, its cache and its few-step sampler against LongLive 1.0."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streams
import wan

from longlive_jax import sampler
from longlive_jax.config import Recache, SamplerConfig, StreamConfig
from longlive_jax.convert import wan_dit
from longlive_jax.convert.table import export
from longlive_jax.dit import cache as slots
from longlive_jax.dit import mask
from longlive_jax.dit.attention import masked
from longlive_jax.dit.rope import phases
from longlive_jax.flow import Flow

LONGLIVE1 = dataclasses.replace(wan.LONGLIVE2, text_len=14, freq_dim=32)
A, B, B2, C = "A_train_forward", "B_kv_cache", "B2_kv_cache_variants", "C_causal_inference"
D, D2, D3, D4 = (
    "D_interactive_global_sink",
    "D2_interactive_no_global_sink",
    "D3_interactive_infinity",
    "D4_switch_pipeline",
)
E = "E_kv_cache_infinity"
CHUNK, TOKENS = 3, streams.TOKENS
GRID = (8, 6)  # of D's latents


@functools.cache
def read(case):
    with np.load(wan.GOLDEN / "longlive1" / f"{case}.npz") as file:
        return dict(file)


@functools.cache
def model(case):
    return wan.load(LONGLIVE1, wan.weights(read(case)))


@functools.cache
def tolerances(case):
    return json.loads((wan.GOLDEN / "longlive1" / "index.json").read_text())[case]["tolerance"]


def close(ours, case, name, part=slice(None)):
    """Compares with (a part of) an output of a case, at the tolerance of its index."""
    name = f"out/{name}"
    theirs, atol = read(case)[name][part], tolerances(case)[name]["atol"]
    np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0, err_msg=name)


# Whole sequences: A.


def angles(dit, x, video):
    """Phases of b f h w c; positions start again every `video` frames."""
    position = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.float32) % video, x.shape[:2])
    return phases(dit.cfg, position, x.shape[2] // 2, x.shape[3] // 2)


@functools.partial(streams.jit, static_argnames=("table", "video"))
def forward(dit, x, t, text, *, table, video):
    return velocity(dit, x, t, text, table, video)


def velocity(dit, x, t, text, table, video):
    attn = masked(np.array(table), angles(dit, x, video))
    return dit(x, t, dit.text_kv(text), attn)[0]


@functools.partial(streams.jit, static_argnames=("table", "video"))
def forward_and_gradient(dit, x, t, text, cotangent, *, table, video):
    """Velocity, and the gradient of its product with `cotangent` with respect to the weights."""

    def product(dit):
        v = velocity(dit, x, t, text, table, video)
        return jnp.sum(v * cotangent), v

    gradient, v = jax.grad(product, has_aux=True)(dit)
    return v, gradient


def inputs(x, t, labels, **limits):
    """Arguments of a forward over the latents named `x` (b c f h w) and the timesteps named `t`."""
    case = read(A)
    prompts = case[
        "in/context"
    ]  # shorter than the model's length: rows of zeros follow, and are attended
    text = np.pad(prompts, ((0, 0), (0, LONGLIVE1.text_len - prompts.shape[1]), (0, 0)))
    x = np.concatenate([case[f"in/{name}"] for name in x], 2)
    t = np.concatenate(
        [case[f"in/{name}"] if name else np.zeros((2, 12), np.float32) for name in t], 1
    )
    table = tuple(map(tuple, mask.table(labels, **limits).tolist()))
    arrays = wan.channel_last(x), jnp.asarray(t), jnp.asarray(text[:, None])
    return arrays, dict(table=table, video=len(set(labels.frame)))


VIDEO, IMAGE = mask.clean(12, CHUNK), mask.clean(10, CHUNK, first=1)
FORWARDS = {
    "blockwise_window": (["x"], ["t_free"], VIDEO, 6),
    "teacher_forcing": (["clean_x", "x"], ["", "t"], mask.teacher_forcing(VIDEO), None),
    "teacher_forcing_aug": (["clean_x", "x"], ["aug_t", "t"], mask.teacher_forcing(VIDEO), None),
    "i2v_global": (["x_i2v"], ["t_i2v"], IMAGE, None),
    "i2v_window": (["x_i2v"], ["t_i2v"], IMAGE, 6),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_A_train_forward(name):
    x, t, labels, window = FORWARDS[name]
    arrays, static = inputs(x, t, labels, window=window)
    out = forward(model(A), *arrays, **static)
    close(wan.channel_first(out[:, -len(set(labels.frame)) :]), A, name)


def test_A_train_forward_gradients():
    """blockwise_global, and the gradient of every weight, under its PyTorch name."""
    arrays, static = inputs(["x"], ["t"], VIDEO)
    cotangent = wan.channel_last(read(A)["in/cotangent"])
    out, gradient = forward_and_gradient(model(A), *arrays, cotangent, **static)
    close(wan.channel_first(out), A, "blockwise_global")
    gradient = export(gradient, wan_dit.rows(LONGLIVE1))
    assert {f"out/grad/{name}" for name in gradient} == {k for k in read(A) if "/grad/" in k}
    for name, value in gradient.items():
        close(value, A, f"grad/{name}")


MASKS = {
    "blockwise_global": (VIDEO, None),
    "blockwise_window": (VIDEO, 6),
    "teacher_forcing": (mask.teacher_forcing(VIDEO), None),
    "i2v_global": (IMAGE, None),
    "i2v_window": (IMAGE, 6),
    "odd_blockwise": (mask.clean(7, CHUNK), None),
}


def frame_mask(labels, name, tokens=6):
    """The reference's mask, by frame."""
    frames = len(labels.frame)
    theirs = read(A)[f"out/mask_{name}"].astype(bool)[: frames * tokens, : frames * tokens]
    theirs = theirs.reshape(frames, tokens, frames, tokens)
    assert (theirs == theirs[:, :1, :, :1]).all()
    return theirs[:, 0, :, 0]


@pytest.mark.parametrize("name", MASKS)
def test_A_train_forward_masks(name):
    labels, window = MASKS[name]
    np.testing.assert_array_equal(mask.table(labels, window=window), frame_mask(labels, name))


def test_A_train_forward_masks_window_of_a_chunk_cut_short():
    """7 frames in chunks of 3: the reference's last window counts from where its chunk would end.

    Ours counts from where it ends, as the streaming cache does, and has two frames more.
    """
    labels = mask.clean(7, CHUNK)
    ours, theirs = mask.table(labels, window=6), frame_mask(labels, "odd_blockwise_window")
    assert np.argwhere(ours != theirs).tolist() == [[6, 1], [6, 2]]
    assert ours[6].tolist() == [False] + [True] * 6


# Calls over the rolling cache: B, B2 and, with relative positions, E. All run with two rows, so
# that they share a compilation.


def as_we_do(number, taken, cache):
    """Slots that call `number` writes, and those it sees."""
    return taken, cache.filled


@functools.cache
def stream_of(case, prefix, window, sink, rule=as_we_do):
    """Every call's velocity, x0 and cache, and the text that all calls see."""
    arrays, dit, previous = read(case), model(B), -1
    x, t = (two_rows(arrays[f"in/{prefix}{name}"]) for name in ("x", "timestep"))
    text = streams.text(dit, jnp.asarray(two_rows(arrays[f"in/{prefix}prompt_embeds"], 0)))
    cache = slots.empty(dit.cfg, StreamConfig(CHUNK, window, sink), 2, TOKENS)
    calls, relative = [], case == E
    starts = arrays[f"in/{prefix}start_frame"].tolist()
    x, t = jnp.asarray(np.moveaxis(x, -3, -1)), jnp.asarray(t)
    for number, start in enumerate(starts):
        if start != previous:
            labels = jnp.int32(start), jnp.int32(start // CHUNK)
            taken, cache = streams.claim(cache, *labels, frames=CHUNK, sink=sink)
            previous = start
        position = (slots.rank(cache) if relative else cache.frame).astype(jnp.float32)
        own = jnp.take_along_axis(position, taken, 1)
        written, seen = rule(number, taken, cache)
        now = x[number], t[number]
        inputs = dit, cache, written, seen, own, *now, text, position if relative else None
        v, cache = streams.call(*inputs)
        calls.append((v, Flow(5.0).to_x0(v, *now), cache))
    return calls, text


def two_rows(x, axis=1):
    return np.repeat(x, 2 // x.shape[axis], axis)


def kept(frames, size, sink):
    """What a rolling cache of `size` frames holds after `frames` of them, in its order."""
    return [*range(min(sink, frames)), *range(max(sink, frames - size + sink), frames)]


def close_by_frame(cache, ours, case, name, frames, part=np.s_[:], grid=streams.GRID, raw=None):
    """Compares keys or values, layers b slots …; `frames` are those in the reference's cache.

    part: of the reference's array, where it is not layers b tokens a d. grid: latent rows and
    columns. raw: the model, where positions are relative: the reference keeps keys as they come.
    """
    theirs, atol = read(case)[f"out/{name}"][part], tolerances(case)[f"out/{name}"]["atol"]
    theirs = theirs.reshape(*theirs.shape[:2], -1, math.prod(grid) // 4, *theirs.shape[-2:])
    theirs = streams.in_space(raw.cfg, theirs, grid) if raw else theirs
    for row in range(theirs.shape[1]):
        for frame, value in streams.by_frame(cache, ours, row).items():
            expected = theirs[:, row, frames.index(frame)]
            np.testing.assert_allclose(value[: len(theirs)], expected, atol=atol, rtol=0)


VARIANTS = {  # file and prefix of the arrays: window, sink, frames in the reference's cache
    (B, ""): (12, 3, 12),
    (B2, "train_"): (6, 3, 9),
    (B2, "global_"): (12, 0, 12),
    (E, ""): (6, 3, 6),
}


@pytest.mark.parametrize("case, prefix", VARIANTS)
def test_cached_calls(case, prefix):
    window, sink, size = VARIANTS[case, prefix]
    calls, text = stream_of(case, prefix, window, sink)
    rows = read(case)[f"out/{prefix}flow"].shape[1]
    v, x0 = (np.moveaxis(np.stack(x), -1, -3) for x in list(zip(*calls, strict=True))[:2])
    close(v[:, :rows], case, f"{prefix}flow")
    close(x0[:, :rows], case, f"{prefix}x0")
    close(np.asarray(text.k)[:, :rows, 0], case, f"{prefix}crossattn_k_final")
    cache = calls[-1][-1]
    held = kept(read(case)[f"in/{prefix}start_frame"][-1] + CHUNK, size, sink)
    raw = model(B) if case == E else None
    close_by_frame(cache, cache.k, case, f"{prefix}cache_k_final", held, raw=raw)
    close_by_frame(cache, cache.v, case, f"{prefix}cache_v_final", held)


def test_B_kv_cache_chunk_by_chunk():
    calls, _ = stream_of(B, "", 12, 3)
    for chunk, (*_, cache) in enumerate(calls[2::3]):
        part = np.s_[None, chunk]
        held = kept((chunk + 1) * CHUNK, 12, 3)
        close_by_frame(cache, cache.k, B, "cache_k_layer0_per_chunk", held, part)


def as_the_reference_does_with_an_odd_sink(number, taken, cache):
    """A sink of 4 frames ends inside the second chunk.

    The first chunk's calls attend the sink's last slot while it is still empty. The second chunk's
    later calls leave that slot (3) as its first call, the noisiest, wrote it; nobody sees their
    key.
    """
    if number < 3:
        return taken, cache.filled.at[:, 3].set(True)
    return (taken.at[:, 0].set(11) if number in (4, 5) else taken), cache.filled


def test_B2_kv_cache_variants_odd_sink():
    """With these two habits of the reference our calls are its calls."""
    calls, _ = stream_of(B2, "odd_", 12, 4, as_the_reference_does_with_an_odd_sink)
    v, x0 = (np.moveaxis(np.stack(x), -1, -3)[:, :1] for x in list(zip(*calls, strict=True))[:2])
    close(v, B2, "odd_flow")
    close(x0, B2, "odd_x0")
    cache, held = calls[-1][-1], kept(18, 12, 4)
    close_by_frame(cache, cache.k, B2, "odd_cache_k_final", held)
    close_by_frame(cache, cache.v, B2, "odd_cache_v_final", held)


def test_B2_kv_cache_variants_odd_sink_is_clean_in_ours():
    """Without them the sink's last frame has its clean key, and the first block differs in no
    other.
    """
    calls, _ = stream_of(B2, "odd_", 12, 4)
    cache, first = calls[-1][-1], calls[3][-1]
    theirs = read(B2)["out/odd_cache_k_final"][0, 0].reshape(12, TOKENS, 2, 32)
    theirs = dict(zip(kept(18, 12, 4), theirs, strict=True))
    ours = {frame: k[0] for frame, k in streams.by_frame(cache, cache.k).items()}
    atol = tolerances(B2)["out/odd_cache_k_final"]["atol"]
    apart = [frame for frame in sorted(ours) if np.abs(ours[frame] - theirs[frame]).max() > atol]
    assert apart == [3]
    noisy = streams.by_frame(first, first.k)[3][0]
    np.testing.assert_allclose(noisy, theirs[3], atol=atol, rtol=0)


@pytest.mark.parametrize("kind", ["protect", "rewrite"])
def test_B_kv_cache_recache_without_a_mask(kind):
    """The reference's recache lets the re-read frames see each other both ways; here it is a call
    over the table, for its velocities.

    Both re-read frames 9 … 20; `protect` keeps the old sinks in the place of the first three.
    """
    dit, arrays, old = model(B), read(B), stream_of(B, "", 12, 3)[0][-1][-1]
    sinks = np.argsort(np.asarray(old.frame[0]))[:CHUNK]
    pad = lambda x: jnp.pad(x[:, :, sinks], ((0, 0), (0, 0), (0, 12), *[(0, 0)] * 3))  # noqa: E731
    frames = jnp.broadcast_to(jnp.asarray([0, 1, 2, *range(9, 21)], jnp.int32), (2, 15))
    cache = slots.KVCache(frames, frames // CHUNK, jnp.zeros_like(frames), pad(old.k), pad(old.v))
    visible = (frames < 3) | (frames >= 12) if kind == "protect" else frames >= 9
    taken = jnp.broadcast_to(jnp.arange(3, 15, dtype=jnp.int32), (2, 12))
    x = jnp.asarray(np.moveaxis(arrays["in/recache_x"], -3, -1))
    text = streams.text(dit, jnp.asarray(arrays["in/recache_prompt_embeds"]))
    position, t = frames[:, 3:].astype(jnp.float32), jnp.zeros((2, 1))
    v, cache = streams.call(dit, cache, taken, visible, position, x, t, text)
    close(np.moveaxis(np.asarray(v), -1, -3), B, f"recache_{kind}_flow")
    cache = dataclasses.replace(cache, frame=jnp.where(visible, cache.frame, slots.EMPTY))
    held = [0, 1, 2, *range(12, 21)] if kind == "protect" else list(range(9, 21))
    close_by_frame(cache, cache.k, B, f"recache_{kind}_cache_k", held)


def zeroed(video):
    """With empty sinks: the reference empties all before a recache, also one that writes none."""
    cache = video.cache
    sinks = slots.is_sink(cache, CHUNK)[None, :, :, None, None, None]
    k, v = (jnp.where(sinks, 0.0, x) for x in (cache.k, cache.v))
    return dataclasses.replace(video, cache=dataclasses.replace(cache, k=k, v=v))


FIRST, KEEP, WINDOW = (Recache("bidirectional", sinks) for sinks in ("first", "keep", "window"))
RECACHES = {"protect": KEEP, "rewrite": WINDOW, "zeroed_no_rewrite": KEEP}


@pytest.mark.parametrize("kind", RECACHES)
def test_E_kv_cache_infinity_recache(kind):
    """After the last call frames 18 … 23 are re-read."""
    dit, arrays, stream = model(B), read(E), StreamConfig(CHUNK, 6, CHUNK, rope="relative")
    x = np.moveaxis(two_rows(arrays["in/recache_x"], 0), -3, -1)
    latents = np.pad(x, ((0, 0), (CHUNK, 0), *[(0, 0)] * 3))  # none of the old sinks
    frames = jnp.broadcast_to(jnp.asarray([0, 1, 2, *range(18, 24)], jnp.int32), (2, 9))
    held = slots.Held(frames, frames // CHUNK, jnp.zeros_like(frames), jnp.asarray(latents))
    cache = stream_of(E, "", 6, CHUNK)[0][-1][-1]
    video = streams.begin(dit, stream, SAMPLER, batch=2)
    video = dataclasses.replace(video, cache=cache, held=held)
    video = zeroed(video) if kind == "zeroed_no_rewrite" else video
    text = streams.text(dit, jnp.asarray(two_rows(arrays["in/recache_prompt_embeds"], 0)))
    choices = dict(stream=stream, how=RECACHES[kind])
    cache = streams.recache(dit, video, text, jnp.ones(2, bool), **choices).cache
    order = [*range(18, 24)] if kind == "rewrite" else [0, 1, 2, 21, 22, 23]
    assert streams.attended(cache) == [order] * 2
    close_by_frame(cache, cache.k, E, f"recache_{kind}_cache_k", order, raw=dit)


# Whole videos: C, and D with prompts that change.

STREAM = StreamConfig(CHUNK, window=12, sink=3)
SAMPLER = SamplerConfig("renoise", steps=4, shift=5.0, timesteps=(1000, 750, 500, 250))


@pytest.mark.parametrize("prefix", ["", "global_", "inf_"], ids=lambda p: f"{C}-{p}")
def test_latents(prefix):
    """`global_` attends everything, as our window does while the video is shorter than it; `inf_`
    has relative positions.
    """
    dit, arrays, solver = model(C), read(C), sampler.make(SAMPLER)
    stream = dataclasses.replace(STREAM, rope="relative" if prefix == "inf_" else "absolute")
    noise = arrays[f"in/{prefix}noise"]  # b f c h w
    rows, frames, *picture = noise.shape
    draws = arrays[f"in/{prefix}renoise"].reshape(
        -1, 3, rows, CHUNK, *picture
    )  # chunk step b f c h w
    both = lambda x, axis: jnp.asarray(np.moveaxis(np.repeat(x, 2 // rows, axis), -3, -1))  # noqa: E731
    noise, draws = both(noise, 0), both(draws, 2)
    prompts = np.repeat(arrays["in/prompt_embeds"][:rows], 2 // rows, 0)
    text = streams.text(dit, jnp.asarray(prompts))
    video, latents = streams.begin(dit, stream, SAMPLER, batch=2), []
    for chunk, renoise in enumerate(draws):
        first = noise[:, chunk * CHUNK : (chunk + 1) * CHUNK]
        inputs = dit, video, text, first, renoise
        video, out = streams.denoise(*inputs, stream=stream, solver=solver)
        latents.append(np.moveaxis(np.asarray(out[:rows]), -1, -3))
    close(np.concatenate(latents, 1), C, f"{prefix}latents")
    held = kept(frames, STREAM.window, STREAM.sink)
    raw = dit if prefix == "inf_" else None
    close_by_frame(video.cache, video.cache.k, C, f"{prefix}cache_k_final", held, raw=raw)


def switched(switches, rope="absolute", before=lambda video: video):
    """The latents b f c h w of D's noise, 27 frames in a window of 9, and the cache at the end.

    switches: first frame under the next prompt -> how its recache is done. before: what happens to
    the memory right before.
    """
    dit, arrays, solver = model(C), read(D), sampler.make(SAMPLER)
    stream = StreamConfig(CHUNK, window=9, sink=CHUNK, rope=rope)
    noise, draws = (np.moveaxis(arrays[f"in/{name}"], -3, -1) for name in ("noise", "renoise"))
    draws = draws.reshape(-1, 3, 1, CHUNK, *draws.shape[2:])  # chunk step b f h w c
    texts = [
        streams.text(dit, jnp.asarray(arrays[f"in/prompt_embeds_seg{segment}"]))
        for segment in range(len(switches) + 1)
    ]
    video = streams.begin(dit, stream, SAMPLER, grid=GRID)
    text, latents = texts.pop(0), []
    for start, renoise in zip(range(0, 27, CHUNK), draws, strict=True):
        if start in switches:
            text, choices = texts.pop(0), dict(stream=stream, how=switches[start])
            video = streams.recache(dit, before(video), text, jnp.ones(1, bool), **choices)
        first = jnp.asarray(noise[:, start : start + CHUNK])
        inputs = dit, video, text, first, jnp.asarray(renoise)
        video, out = streams.denoise(*inputs, stream=stream, solver=solver)
        latents.append(np.moveaxis(np.asarray(out), -1, -3))
    return np.concatenate(latents, 1), video.cache


NEWEST = [*range(21, 27)]
SWITCHES = {  # first frames under a new prompt and how they are prepared, sinks at the end
    D: ({6: FIRST, 18: KEEP}, [0, 1, 2], "absolute"),
    D2: ({6: WINDOW, 18: WINDOW}, [9, 10, 11], "absolute"),
    D3: ({6: FIRST, 18: KEEP}, [0, 1, 2], "relative"),
}


@pytest.mark.parametrize("case", SWITCHES)
def test_switches(case):
    """In D and D3 the reference writes the sink anew at the first switch: the video is still within
    its window.
    """
    switches, sinks, rope = SWITCHES[case]
    latents, cache = switched(switches, rope)
    close(latents, case, "latents")
    assert streams.attended(cache) == [sinks + NEWEST]
    raw = model(C) if rope == "relative" else None
    close_by_frame(cache, cache.k, case, "cache_k_final", sinks + NEWEST, grid=GRID, raw=raw)


def differs(latents, case) -> list[int]:
    """First frames of the chunks that are not those of the reference."""
    theirs, atol = read(case)["out/latents"], tolerances(case)["out/latents"]["atol"]
    apart = np.abs(latents - theirs).max((0, 2, 3, 4)) > atol
    return [start for start in range(0, 27, CHUNK) if apart[start : start + CHUNK].any()]


def test_D_interactive_global_sink_is_kept_at_the_first_switch_in_ours():
    """Its keys are then those of a video without a switch, and chunks differ from there on."""
    latents, cache = switched({6: KEEP, 18: KEEP})
    assert differs(latents, D) == [*range(6, 27, CHUNK)]
    plain = switched({})[1]
    ours, before = (streams.by_frame(c, c.k) for c in (cache, plain))
    assert all(np.array_equal(ours[frame], before[frame]) for frame in range(CHUNK))


def test_D4_switch_pipeline():
    """The reference empties its sinks, does not write them, and attends them."""
    latents, cache = switched({18: KEEP}, before=zeroed)
    close(latents, D4, "latents")
    close_by_frame(cache, cache.k, D4, "cache_k_final", [0, 1, 2, *NEWEST], grid=GRID)
    ours = streams.by_frame(cache, cache.k)
    assert not any(ours[frame].any() for frame in range(CHUNK))


def test_D4_switch_pipeline_has_sinks_in_ours():
    """They are the oldest frames of the window, as in D2, whatever the memory held before."""
    latents, cache = switched({18: WINDOW})
    assert differs(latents, D4) == [18, 21, 24]
    assert streams.attended(cache) == [[9, 10, 11, *NEWEST]]
    keys = streams.by_frame(cache, cache.k)
    assert all(np.abs(key).max((2, 3)).min() > 0.1 for key in keys.values())
    again, _ = switched({18: WINDOW}, before=zeroed)
    np.testing.assert_array_equal(again, latents)
