"""Videos through the VAE and back: what of a score is lost before the transformer has any say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from longlive_jax import timeline
from longlive_jax.config import ModelConfig
from longlive_jax.eval.toy_suite import Video
from longlive_jax.vae import vae as coder
from longlive_jax.vae.vae import VAE, VAECarry

Carries = tuple[VAECarry, VAECarry]  # of the encoder and the decoder


def reconstructor(
    cfg: ModelConfig, vae: VAE, *, batch: int = 16
) -> Callable[[Sequence[Video]], Iterator[Video]]:
    """A callable that takes videos of one length to their reconstructions, `batch` at a time."""

    def reconstruct(videos: Sequence[Video]) -> Iterator[Video]:
        for i in range(0, len(videos), batch):
            group = list(videos[i : i + batch])
            rows = group + [group[-1]] * (batch - len(group))  # one compiled shape
            yield from _whole(cfg, vae, np.stack(rows))[: len(group)]

    return reconstruct


def _whole(
    cfg: ModelConfig, vae: VAE, videos: UInt8[np.ndarray, "b t H W 3"]
) -> UInt8[np.ndarray, "b t H W 3"]:
    batch, frames, height, width, _ = videos.shape
    carries = (
        coder.init_encode_carry(vae, batch, height, width),
        coder.init_carry(vae, batch, height, width),
    )
    starts = [0, *timeline.chunk_starts(cfg, frames)]
    pieces = []
    for start, stop in zip(starts, [*starts[1:], frames], strict=True):
        piece, carries = _through(vae, carries, videos[:, start:stop], first=start == 0)
        pieces.append(np.asarray(piece))
    return np.concatenate(pieces, 1)


@functools.partial(jax.jit, static_argnames="first")
def _through(
    vae: VAE, carries: Carries, pixels: UInt8[Array, "b t H W 3"], *, first: bool
) -> tuple[UInt8[Array, "b t H W 3"], Carries]:
    video = pixels.astype(jnp.float32) / 127.5 - 1.0
    latents, encoded = coder.encode_stream(vae, carries[0], video, first=first)
    frames, decoded = coder.stream(vae, carries[1], latents, first=first)
    back = jnp.clip(jnp.round((frames + 1.0) * 127.5), 0.0, 255.0).astype(jnp.uint8)
    return back, (encoded, decoded)
