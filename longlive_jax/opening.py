"""How a video begins: with a prompt alone, with an image, or where a clip ends."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from longlive_jax import arguments, rollout, timeline
from longlive_jax.config import ModelConfig
from longlive_jax.errors import InputError
from longlive_jax.progress import Position, Progress
from longlive_jax.rollout import Latents
from longlive_jax.session import Session, State
from longlive_jax.undo import Past
from longlive_jax.vae import vae as coder

if TYPE_CHECKING:
    from longlive_jax.model import Model

WINDOWS = 2  # of attention, at the end of a clip that is continued: what came before is not read
# A file, a PIL image, an array (uint8, or from 0 to 1, [t] H W [c]), or a list of pictures.
Pixels = Any


def begin(
    model: Model,
    prompt: str,
    *,
    seed: int = 0,
    steps: int | None = None,
    image: Pixels | None = None,
    video: Pixels | None = None,
    history: int = 0,
    vae_device: jax.Device | None = None,
) -> Session:
    """See `Model.session`."""
    prompt = arguments.prompt(prompt)
    seed = arguments.seed(seed)
    history = arguments.whole("history", history, 0)
    solver = model.solver(steps)
    if image is not None and video is not None:
        raise InputError("a video begins with an image or continues a clip, not both")
    cfg, text, given, notes = model.config, model.prompt_kv([prompt]), None, ()
    if image is not None:
        given, note = picture(model, image)
        notes = (note,)
    carry = coder.init_carry(model.vae, 1, cfg.height, cfg.width)
    state = State(rollout.begin(cfg, [seed], text.k.dtype), carry, text)
    position = Position(prompt=prompt, whole=prompt)
    if video is not None:
        from longlive_jax import media, pixels  # PyAV, which a prompt alone does not need

        frames, done = (video, "") if pixels.is_file(video) else pixels.clip(video)
        clip = media.read_clip(frames, cfg.height, cfg.width, cfg.fps, last=_remembered(cfg))
        state, position, note = _continued(model, state, position, clip.frames)
        notes = (_listed(done, clip.note), note)
    if vae_device is not None:
        state = State(state.rollout, jax.device_put(state.carry, vae_device), text)
    notes = tuple(filter(None, (*model.notes, *notes, model.prompt_note(prompt))))
    frame = timeline.first_frame(cfg, position.latents)
    progress = Progress(model, position, frame, Past(history))
    choices = dict(given=given, vae_device=vae_device, notes=notes, seed=seed)
    return Session(state, progress, solver=solver, **choices)


def picture(model: Model, image: Pixels) -> tuple[Latents, str]:
    """The latent frame of a picture, b 1 h w c, and what was done to make it fit; "" is nothing.

    Raises InputError for what cannot be read.
    """
    from longlive_jax import media, pixels  # PyAV, which a prompt alone does not need

    frame, done = (image, "") if pixels.is_file(image) else pixels.picture(image)
    found = media.read_image(frame, model.config.height, model.config.width)
    return _encode(model.vae, _floats(found.frames)), _listed(done, found.note)


def _listed(*notes: str) -> str:
    return ", ".join(filter(None, notes))


def _remembered(cfg: ModelConfig) -> int:
    """Return the frames of a clip that is continued: as many chunks as are attended, twice, since
    the first half of them is what the keys and values of the other half depend on.
    """
    chunks = math.ceil(WINDOWS * cfg.stream.window / cfg.stream.chunk)
    return chunks * cfg.frames_per_chunk - (cfg.vae.time_stride - 1)


def _continued(
    model: Model, state: State, position: Position, frames: UInt8[np.ndarray, "t H W 3"]
) -> tuple[State, Position, str]:
    """The state where a clip ends: its latents are the chunks so far. What does not fill a chunk is
    left out at the start, where it matters least.
    """
    cfg = model.config
    stride, chunk = cfg.vae.time_stride, cfg.stream.chunk
    chunks = (1 + (len(frames) - 1) // stride) // chunk
    if not chunks:
        least = cfg.frames_per_chunk - (stride - 1)
        raise InputError(
            f"a clip must have at least {least} frames at {cfg.fps} FPS, this one has {len(frames)}"
        )
    used = cfg.frames_per_chunk * chunks - (stride - 1)
    skipped, memory, carry = len(frames) - used, state.rollout, state.carry
    coding, start = coder.init_encode_carry(model.vae, 1, cfg.height, cfg.width), skipped
    for index in range(chunks):
        end = skipped + cfg.frames_per_chunk * (index + 1) - (stride - 1)
        first, piece = index == 0, _floats(frames[start:end])
        latents, coding = _encode_next(model.vae, coding, piece, first=first)
        memory = rollout.absorb(model.dit, memory, state.text, latents, stream=cfg.stream)
        carry, _ = rollout.decode(model.vae, carry, latents, first=first)
        start = end
    position = Position(chunks, chunks * chunk, position.prompt, position.whole)
    note = f"the first {skipped} frames do not fill a chunk and are left out" if skipped else ""
    return State(memory, carry, state.text), position, note


def _floats(frames: UInt8[np.ndarray, "t H W 3"]) -> Float[Array, "1 t H W 3"]:
    return jnp.asarray(frames[None], jnp.float32) / 127.5 - 1.0


@jax.jit
def _encode(vae: coder.VAE, frames: Float[Array, "b t H W 3"]) -> Latents:
    return coder.encode(vae, frames)


_encode_next = jax.jit(coder.encode_stream, static_argnames="first", donate_argnums=1)
