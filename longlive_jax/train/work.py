"""Who does what in a step of training.

What a rank does in a step (FLOPs, of forward, gradient, and what is computed again):

    dit   Matrix products for each of its tokens, and attention of its heads over all pairs that
          the table shows. Ranks have equally many tokens and, by Ulysses, all queries of equally
          many heads: this is even in all ways, also in plain SP.
    vae   The encoder, of every latent that it makes. Even in all ways, but plain SP does it once
          on every rank; see `Work.slowest`. With a halo instead of a neighbour it is not even.
    loss  Of the noisy frames that it holds. In plain SP that is none on the first half of the
          ranks. `train/ar.py` keeps latents, noise and loss in the order of the video, so it has
          this even in plain SP, and moves latents and velocities there and back instead:
          `Plan.plain_moves`. A plan's `balance` has the loss where the frames lie.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import footprint, weights
from longlive_jax.config import ModelConfig
from longlive_jax.dit import mask
from longlive_jax.train.order import Order
from longlive_jax.vae import sharded
from longlive_jax.vae.vae import VAECarry, encode_stream

# Times the forward: itself, again, and the gradient: two products for each, five for attention's
# two (arXiv 2307.08691 section 3.1).
LINEAR, ATTENTION = 4.0, 4.5
LOSS = 8  # operations for each number of a latent, gradient included


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs for one video, rank by rank."""

    dit: tuple[float, ...]
    vae: tuple[float, ...]
    loss: tuple[float, ...]
    latents: tuple[int, ...]  # that each rank's VAE encodes

    @property
    def parts(self) -> dict[str, tuple[float, ...]]:
        total = tuple(map(sum, zip(self.dit, self.vae, self.loss, strict=True)))
        return dict(dit=self.dit, vae=self.vae, loss=self.loss, total=total)

    @property
    def balance(self) -> dict[str, float]:
        """Most over mean: 1 where all ranks are done at the same time."""
        return {name: max(x) * len(x) / sum(x) for name, x in self.parts.items()}

    @property
    def slowest(self) -> dict[str, float]:
        """FLOPs of the rank with the most."""
        return {name: max(x) for name, x in self.parts.items()}


def of_ways(cfg: ModelConfig, latents: int, ranks: int) -> dict[str, Work]:
    """Of a video of so many latents, in the three ways of `plan`."""
    share = tuple(part.latents for part in _accounts(cfg, latents, ranks)["neighbour"].ranks)
    return {
        "alone": _work(cfg, latents, Order(1), (latents,)),
        "plain": _work(cfg, latents, Order(1), (latents,) * ranks),
        "balanced": _work(cfg, latents, Order(ranks), share),
    }


def _work(cfg: ModelConfig, length: int, order: Order, latents: tuple[int, ...]) -> Work:
    """latents: that each rank's VAE encodes."""
    video, ranks, frame = mask.clean(length, cfg.stream.chunk), len(latents), cfg.tokens_per_frame
    linear = LINEAR * 2 * length * frame * per_token(cfg)
    pairs = int(order.table(video).sum()) * frame**2
    attention = ATTENTION * 4 * cfg.dit.dim * cfg.dit.layers * pairs
    noisy = np.array(order.labels(video).noisy).reshape(ranks, -1).sum(1)
    numbers = cfg.latent_height * cfg.latent_width * cfg.dit.channels
    return Work(
        dit=((linear + attention) / ranks,) * ranks,
        vae=tuple(encoder_flops(cfg) * count for count in latents),
        loss=tuple(LOSS * numbers * float(frames) for frames in noisy),
        latents=latents,
    )


def per_token(config: ModelConfig) -> float:
    """FLOPs of a token's products with weights and text in the forward."""
    cfg, flat = config.dit, weights.flatten(footprint.dit(config))
    text = ("cross_attn.k.", "cross_attn.v.")
    ours = (
        math.prod(x.shape)
        for name, x in flat.items()
        if name.endswith(".kernel")
        and (name.startswith(("blocks.", "patch_embedding.", "head.")))
        and not any(part in name for part in text)
    )
    return 2.0 * sum(ours) + 4.0 * cfg.layers * cfg.text_len * cfg.dim


@functools.cache
def encoder_flops(cfg: ModelConfig) -> float:
    """FLOPs of encoding one latent, as XLA counts them. Nothing is allocated."""
    ledger = VAECarry((sharded.Ledger(1, []),) * 3)

    def run(vae, frames):
        return encode_stream(vae, ledger, frames, first=False)[0]

    frames = jax.ShapeDtypeStruct((1, cfg.vae.time_stride, cfg.height, cfg.width, 3), jnp.bfloat16)
    costs = jax.jit(run).lower(footprint.vae(cfg), frames).cost_analysis()
    return float(costs["flops"])


def _accounts(cfg: ModelConfig, latents: int, ranks: int) -> dict[str, sharded.Account]:
    return sharded.accounts(cfg.vae, latents, ranks, height=cfg.height, width=cfg.width)


def encoding(cfg: ModelConfig, latents: int, ranks: int) -> dict[str, dict[str, Any]]:
    """Latents that each rank encodes and bytes that it gets, where it asks its neighbour and where
    it begins early.
    """
    return {
        way: {
            "latents": [part.latents for part in account.ranks],
            "bytes": [part.nbytes for part in account.ranks],
            "balance": account.balance,
        }
        for way, account in _accounts(cfg, latents, ranks).items()
    }
