"""Seconds, frames and chunks: which frame a chunk begins with."""

from __future__ import annotations

import math

from longlive_jax.config import ModelConfig
from longlive_jax.errors import InputError

LONGEST = 2**31  # frames are counted in int32


def frame_count(config: ModelConfig, seconds: float | int) -> int:
    """Frames in a video of that length: round(seconds * fps).

    Raises:
      InputError: that is no frame at all, or more than can be counted.
    """
    frames = seconds * config.fps
    if not (math.isfinite(frames) and 1 <= round(frames) < LONGEST):
        raise InputError(f"a video of {seconds:g} s at {config.fps} FPS cannot be made")
    return round(frames)


def first_frame(config: ModelConfig, latent: int) -> int:
    """Index of the first frame that a latent frame decodes to: the video's first latent frame is
    one frame, every other one `time_stride`.
    """
    return max(0, latent * config.vae.time_stride - (config.vae.time_stride - 1))


def chunk_starts(config: ModelConfig, frames: int) -> range:
    """Index of the first frame of every chunk but the first, which starts at 0.

    The first latent frame decodes to one frame, so the first chunk is `time_stride - 1` shorter.
    """
    first = config.frames_per_chunk - (config.vae.time_stride - 1)
    return range(first, frames, config.frames_per_chunk)


def chunk_count(config: ModelConfig, seconds: float | int) -> int:
    """Chunks of a video, the last one maybe cut short."""
    return 1 + len(chunk_starts(config, frame_count(config, seconds)))


def last_start(config: ModelConfig, seconds: float | int) -> float:
    """When the last chunk begins, in seconds: no later change of prompt can be shown."""
    starts = chunk_starts(config, frame_count(config, seconds))
    return starts[-1] / config.fps if starts else 0.0


def middle(config: ModelConfig, seconds: float | int) -> float:
    """When the middle chunk begins, in seconds.

    Raises:
      InputError: there is only one chunk.
    """
    starts = chunk_starts(config, frame_count(config, seconds))
    if not starts:
        raise InputError(
            f"{seconds:g} s is one chunk; make it longer than {starts.start / config.fps:g} s"
        )
    return starts[len(starts) // 2] / config.fps
