"""Encoding on the ranks of a sequence-parallel group: equality with whole, windows, accounts."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from longlive_jax.config import TINY_VAE, WAN21_VAE, WAN22_VAE, VAEConfig
from longlive_jax.sharding import SEQ, make_mesh
from longlive_jax.vae import sharded
from longlive_jax.vae import vae as wan

STRIDES = ((1, 2), (2, 2), (2, 2))
SMALL21 = VAEConfig(4, 6, 6, (1, 2, 2), 1, STRIDES[1:])
SMALL22 = VAEConfig(8, 5, 6, (1, 2, 4, 4), 1, STRIDES, patch=2, shortcut=True)
FAMILY = {"2.1": SMALL21, "2.2": SMALL22, "tiny": TINY_VAE}
LATENTS = 8
encode = jax.jit(wan.encode)
encode_sharded = jax.jit(sharded.encode_sharded, static_argnames="mesh")
with_halo = jax.jit(sharded.encode_with_halo, static_argnames="window")


@functools.cache
def random_vae(cfg):
    """Weights drawn by NumPy: the modules' own initialisers compile once per shape."""
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: wan.VAE(cfg, rngs=nnx.Rngs(0))))

    def draw(x):
        fan_in = np.prod(x.shape[:-1]) if len(x.shape) > 1 else 100
        return jnp.asarray(rng.normal(len(x.shape) == 1, fan_in**-0.5, x.shape), jnp.float32)

    return nnx.merge(graph, jax.tree.map(draw, state))


def video_of(cfg, latents, batch=1):
    """Frames in (−1, 1), a latent two columns wide."""
    size, frames = cfg.space_stride, 1 + 4 * (latents - 1)
    noise = np.random.default_rng(latents).normal(size=(batch, frames, size, 2 * size, 3))
    return jnp.asarray(np.tanh(noise), jnp.float32)


@functools.cache
def whole(name):
    """Of `LATENTS` latents, two videos: the VAE, the frames, their latents encoded whole."""
    vae = random_vae(FAMILY[name])
    video = video_of(vae.cfg, LATENTS, batch=2)
    return vae, video, encode(vae, video)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def received(program):
    """Bytes that each rank gets by the collective permutations of a compiled program."""
    found = {}
    pattern = r"= f32\[([\d,]+)\]\S* collective-permute\(.*source_target_pairs=\{(\{.*?\})\}"
    for shape, pairs in re.findall(pattern, program):
        for rank in re.findall(r"\d+,(\d+)", pairs):
            amount = 4 * math.prod(map(int, shape.split(",")))
            found[int(rank)] = found.get(int(rank), 0) + amount
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", FAMILY)
def test_ranks_encode_what_one_would_and_exchange_what_the_account_says(name, ranks):
    vae, video, want = whole(name)
    program = encode_sharded.lower(vae, video, make_mesh(seq=ranks)).compile()
    got = program(vae, video)
    close(got, want)
    assert {piece.data.shape[1] for piece in got.addressable_shards} == {LATENTS // ranks}
    videos, _, height, width, _ = video.shape
    both = sharded.accounts(vae.cfg, LATENTS, ranks, height=height, width=width, dtype=jnp.float32)
    account = {i: videos * part.nbytes for i, part in enumerate(both["neighbour"].ranks)}
    assert received(program.as_text()) == {i: n for i, n in account.items() if i > 0}


@pytest.mark.parametrize(("latents", "data", "ranks"), [(1, 1, 1), (6, 2, 2), (12, 1, 4)], ids=str)
def test_any_number_of_latents_for_each_rank_also_of_several_videos(latents, data, ranks):
    vae = random_vae(TINY_VAE)
    video = video_of(TINY_VAE, latents, batch=2)
    got = encode_sharded(vae, video, make_mesh(data=data, seq=ranks))
    close(got, encode(vae, video))


def test_latents_that_cannot_be_shared_equally_are_named():
    vae = random_vae(TINY_VAE)
    with pytest.raises(ValueError, match="6 latents cannot be shared equally among 4 ranks"):
        sharded.encode_sharded(vae, video_of(TINY_VAE, 6), make_mesh(seq=4))
    with pytest.raises(ValueError, match="12 frames .* expected 1 \\+ a multiple of 4"):
        sharded.encode_sharded(vae, video_of(TINY_VAE, 4)[:, :12], make_mesh(seq=1))


def test_windows_are_those_of_the_reference(golden):
    for row in golden("longlive2", "12_chunk_halo")["out/table"]:
        ranks, latents, halo, frames, rank, first, end, start_latent, *_ = row.tolist()
        window = sharded.windows(latents, ranks, halo)[rank]
        assert (window.first, window.end) == (first, end)
        assert window.drop == window.first - start_latent + (start_latent > 0)
        # It cuts the last window of a video that is too short; here such a video is refused.
        start, stop, count, drop, kept = row[8:].tolist()
        assert (window.start, min(window.stop, frames), window.drop) == (start, stop, drop)
        assert stop - start == count and window.end - window.first == kept


@pytest.mark.parametrize("name", ["2.2", "tiny"])
def test_windows_with_a_halo_encode_what_one_would(name):
    """The last of three ranks: its halo begins inside the video."""
    vae = random_vae(FAMILY[name])
    halo = sharded.halo(vae.cfg)
    latents = 3 * (halo // 2 + 1)
    video = video_of(vae.cfg, latents)
    window = sharded.windows(latents, 3, halo)[2]
    assert window.drop == halo + 1
    close(with_halo(vae, video, window), encode(vae, video)[:, window.first :])


@pytest.mark.parametrize(
    ("cfg", "latents"),
    [
        (WAN22_VAE, 28),
        (WAN21_VAE, 28),
        (dataclasses.replace(WAN22_VAE, res_blocks=1), 20),
        (SMALL22, 20),
        (TINY_VAE, 1),
    ],
    ids=lambda x: "" if isinstance(x, VAEConfig) else str(x),
)
def test_halo(cfg, latents):
    assert sharded.halo(cfg) == latents


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_latent_depends_on_as_many_before_it_as_the_halo_says(blocks):
    cfg = dataclasses.replace(SMALL22, res_blocks=blocks)
    halo = sharded.halo(cfg)
    video = video_of(cfg, 33).at[:, 4].set(np.nan)  # the last frame of latent 1
    touched = np.isnan(encode(random_vae(cfg), video)).any((0, 2, 3, 4))
    assert np.flatnonzero(touched).tolist() == list(range(1, halo + 2))


def test_account_of_a_neighbour_is_what_a_stream_remembers():
    """Where each rank has at least as many frames as a layer looks back."""
    cfg = SMALL22
    account = sharded.accounts(cfg, 8, 4, height=16, width=32, dtype=jnp.float32)["neighbour"]
    carry = jax.eval_shape(lambda vae: wan.init_encode_carry(vae, 1, 16, 32), random_vae(cfg))
    remembered = sum(x.size * 4 for x in jax.tree.leaves(carry))
    assert [part.nbytes for part in account.ranks] == [0, *[remembered] * 3]


@pytest.mark.parametrize(
    ("latents", "ranks", "most", "balance"),
    [(96, 2, 77, 1.23), (96, 4, 53, 1.19), (96, 8, 41, 1.18), (384, 4, 125, 1.06)],
)
def test_account_of_full_size(latents, ranks, most, balance):
    both = sharded.accounts(WAN22_VAE, latents, ranks, height=704, width=1280)
    neighbour, halo = both["neighbour"], both["halo"]
    assert {part.latents for part in neighbour.ranks} == {latents // ranks}
    assert neighbour.balance == 1 and sum(part.share for part in neighbour.ranks) == 1
    assert max(part.latents for part in halo.ranks) == most
    assert halo.balance == pytest.approx(balance, abs=0.005)
    assert halo.ranks[0] == neighbour.ranks[0] and halo.ranks[0].nbytes == 0
    # 113 frames that are another's, the most that a halo of 28 needs.
    assert halo.ranks[-1].nbytes == 113 * 704 * 1280 * 3 * 2


def test_the_layout_is_spread_as_it_is_fed():
    """A loader may lay out a video and give each device its piece."""
    vae, video, want = whole("tiny")
    mesh, pieces = make_mesh(seq=2), PartitionSpec(None, SEQ)
    frames = jax.device_put(
        sharded.lay_out(vae.cfg, video), jax.sharding.NamedSharding(mesh, pieces)
    )
    run = jax.shard_map(
        sharded.encode_rank, mesh=mesh, in_specs=(PartitionSpec(), pieces), out_specs=pieces
    )
    close(jax.jit(run)(vae, frames), want)
