"""What the transformer's work allows at most, on a GPU whose rate is known."""

from __future__ import annotations

import dataclasses
import functools

import jax

from longlive_jax import gpus
from longlive_jax.config import ModelConfig
from longlive_jax.train import work


@functools.cache
def forward_flops(cfg: ModelConfig, frames: int) -> float:
    """Of one forward of a chunk that attends `frames` latent frames, its own included."""
    cfg = dataclasses.replace(cfg, precision=None)  # fewer bits are as many products
    tokens = cfg.stream.chunk * cfg.tokens_per_frame
    pairs = tokens * frames * cfg.tokens_per_frame
    return tokens * work.per_token(cfg) + 4.0 * cfg.dit.dim * cfg.dit.layers * pairs


def chunk_flops(cfg: ModelConfig, steps: int, chunk: int | None = None) -> float:
    """Of making a chunk: `steps` forwards and the clean pass where there is one, twice as many
    under guidance.

    chunk: its number in the video, from 0, of which follows how much it remembers; None is one
    whose window is full.
    """
    frames = cfg.stream.window
    if chunk is not None:
        frames = min(frames, (chunk + 1) * cfg.stream.chunk)
    return (steps + cfg.stream.clean_pass) * cfg.sampler.branches * forward_flops(cfg, frames)


def peak() -> float | None:
    """FLOP/s of bfloat16 products on the default device, as its data sheet has it; None where that
    is not known.
    """
    return gpus.peak_flops(jax.devices()[0].device_kind)
