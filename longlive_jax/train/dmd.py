"""Distribution matching distillation (arXiv 2311.18828, 2405.14867; LongLive 2.0 section 4.1,
`model/dmd.py`).

Two models look at a noisy clip of the student's and say what the clean one is. The *real* score is
a teacher that stays as it is; the *fake* score learns what the student makes. Where they differ,
their difference is the direction in which the student's clips should move.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from longlive_jax import flow, sharding
from longlive_jax.dit import mask, parallel
from longlive_jax.dit.attention import as_table
from longlive_jax.dit.model import DiT, TextKV
from longlive_jax.dit.parallel import Ulysses
from longlive_jax.dit.rope import phases
from longlive_jax.errors import InputError
from longlive_jax.flow import Flow
from longlive_jax.rollout import Latents


@dataclasses.dataclass(frozen=True)
class DMDConfig:
    """How clips are judged. The values of LongLive 2.0 are the defaults (appendix I,
    `train_dmd_nvfp4_step4.yaml`).

    real_guidance, fake_guidance: what is added to the conditional score, times its difference to
    the unconditional one: 3 is what samplers call 4. causal: scores see what came before, chunk by
    chunk, each under its own prompt; otherwise all frames see each other, and all prompts.
    score_shift: of the table in which their timesteps are looked up; None is `shift`, LongLive 1.0
    has 8. lowest, highest: timesteps. within: draw them only between the steps around the one at
    which the clip was left: "none", "below", "above" or "both" (`ts_schedule`, `ts_schedule_max`).
    whole: one normaliser for a clip, otherwise for each of its chunks. attention: a backend of
    `longlive_kernels.attention.chunk_table`.
    """

    chunk: int
    shift: float = 5.0
    score_shift: float | None = None
    causal: bool = True
    real_guidance: float = 3.0
    fake_guidance: float = 0.0
    lowest: float = 20.0
    highest: float = 980.0
    per_chunk: bool = False  # a timestep for each chunk, otherwise for each clip
    within: str = "none"
    whole: bool = False
    first: int | None = None  # length of the student's first chunk where it differs
    attention: str = "best"

    WITHIN = ("none", "below", "above", "both")

    def __post_init__(self):
        if self.within not in self.WITHIN:
            raise ValueError(f"within {self.within!r}: choose {', '.join(self.WITHIN)}")
        if self.lowest >= self.highest:
            raise ValueError(f"no timestep is between {self.lowest} and {self.highest}")

    @property
    def table(self) -> Flow:
        """In which noise is looked up."""
        return Flow(self.shift)

    @property
    def score_table(self) -> Flow:
        """In which the scores' timesteps are looked up."""
        return Flow(self.shift if self.score_shift is None else self.score_shift)

    def spans(self, frames: int) -> list[tuple[int, int]]:
        """First, and one past the last frame of every chunk."""
        first = self.chunk if self.first is None else self.first
        starts = [0, *range(first, frames, self.chunk)]
        return list(zip(starts, [*starts[1:], frames], strict=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shown:
    """A clip that is judged: with noise on it, and without.

    counts: which frames are in the loss.
    """

    clean: Latents
    noisy: Latents
    noise: Latents
    t: Float[Array, "b f"]
    counts: Float[Array, "b f"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """context: b p l e. prompt: which of a clip's p prompts each chunk is under. negative: b l e.
    before: clean frames that teacher forcing shows the scores; None for none.
    """

    context: Float[Array, "b p l e"]
    prompt: Int[Array, "b n"]
    negative: Float[Array, "b l e"]
    before: Latents | None = None


def timesteps(index: Int[Array, "b n"], cfg: DMDConfig, frames: int) -> Float[Array, "b f"]:
    """Of every frame, of numbers within 0 … 1000 that are drawn evenly: shifted, and kept within
    bounds (`_get_timestep`, `compute_distribution_matching_loss`). n is 1 or the number of chunks.
    """
    t = index.astype(jnp.float32)
    t = flow.TRAIN_STEPS * flow.shift(t / flow.TRAIN_STEPS, cfg.shift)
    t = jnp.clip(t, cfg.lowest, cfg.highest)
    if t.shape[1] == 1:
        return jnp.repeat(t, frames, 1)
    lengths = np.array([stop - start for start, stop in cfg.spans(frames)])
    return jnp.repeat(t, lengths, axis=1, total_repeat_length=frames)


def bounds(exit_: Int[Array, ""], told: Sequence[float], cfg: DMDConfig) -> tuple[Array, Array]:
    """Between which numbers `timesteps` are drawn, for a clip that was left at a step. told: what
    the student's solver says to the model at each step. Places of the table, which are unshifted.
    """
    places = [flow.TRAIN_STEPS - int(np.argmin(np.abs(cfg.table.timesteps - t))) for t in told]
    places = jnp.asarray([*places, 0], jnp.int32)
    low = places[exit_ + 1] if cfg.within in ("below", "both") else 0
    high = places[exit_] if cfg.within in ("above", "both") else flow.TRAIN_STEPS
    return jnp.asarray(low, jnp.int32), jnp.asarray(high, jnp.int32)


def show(
    clean: Latents,
    noise: Latents,
    t: Float[Array, "b f"],
    cfg: DMDConfig,
    counts: Float[Array, "b f"] | None = None,
    known: Bool[Array, " f"] | None = None,
) -> Shown:
    """A clip with noise on it. known: frames that are given; they stay clean and do not count."""
    counts = jnp.ones(t.shape) if counts is None else counts
    noisy = flow.corrupt(clean, noise, cfg.table.sigma(t))
    if known is not None:
        of_frame = known[None, :, None, None, None]
        noisy, t = jnp.where(of_frame, clean, noisy), jnp.where(known, 0.0, t)
        counts = jnp.where(known, 0.0, counts)
    return Shown(clean, noisy, noise, t, counts)


def gradient(
    real: DiT, fake: DiT, shown: Shown, said: Prompts, cfg: DMDConfig, mesh: Mesh
) -> tuple[Float[Array, ""], Latents, Float[Array, ""]]:
    """The student's loss, its gradient with respect to the clip, and how far the scores are apart,
    on average (`compute_distribution_matching_loss`). The loss is half the mean square of the
    direction, so that its gradient is the direction.
    """
    direction = _direction(real, fake, shown, said, cfg, mesh)
    counts = jnp.broadcast_to(shown.counts[:, :, None, None, None], direction.shape)
    total = jnp.maximum(counts.sum(), 1.0)
    loss = 0.5 * jnp.sum(direction**2 * counts) / total
    return loss, (direction * counts / total).astype(shown.clean.dtype), jnp.abs(direction).mean()


def _direction(
    real: DiT, fake: DiT, shown: Shown, said: Prompts, cfg: DMDConfig, mesh: Mesh
) -> Float[Array, "b f h w c"]:
    """What the fake score says less what the real one says, over how far the real one is from the
    clip (`_compute_kl_grad`).
    """
    of_real = guided(real, shown, said, cfg, mesh, cfg.real_guidance)
    difference = guided(fake, shown, said, cfg, mesh, cfg.fake_guidance) - of_real
    far = jnp.abs(shown.clean.astype(jnp.float32) - of_real).mean((2, 3, 4))  # b f
    if cfg.whole:
        far = jnp.broadcast_to(far.mean(1, keepdims=True), far.shape)
    else:
        spans = [slice(*span) for span in cfg.spans(far.shape[1])]
        means = [jnp.broadcast_to(far[:, s].mean(1, keepdims=True), far[:, s].shape) for s in spans]
        far = jnp.concatenate(means, 1)
    if cfg.first == 1:  # a picture of its own is not normalised
        far = far.at[:, 0].set(1.0)
    return jnp.nan_to_num(difference / far[:, :, None, None, None])


def guided(
    dit: DiT, shown: Shown, said: Prompts, cfg: DMDConfig, mesh: Mesh, scale: float
) -> Float[Array, "b f h w c"]:
    """The clean clip that a score sees, in float32, scale times further from what it sees without a
    prompt.
    """
    x0 = functools.partial(clean_of, dit, shown.noisy, shown.t, cfg=cfg, mesh=mesh)
    conditional = x0(said=said)
    if not scale:
        return conditional
    nothing = dataclasses.replace(
        said, context=said.negative[:, None], prompt=jnp.zeros_like(said.prompt)
    )
    return conditional + scale * (conditional - x0(said=nothing))


def clean_of(
    dit: DiT, x: Latents, t: Float[Array, "b f"], *, said: Prompts, cfg: DMDConfig, mesh: Mesh
) -> Float[Array, "b f h w c"]:
    """The clean clip that a score sees in a noisy one, in float32."""
    v = velocity(dit, x, t, said, cfg, mesh).astype(jnp.float32)
    return cfg.score_table.to_x0(v, x, t if cfg.causal else t[:, :1])


def velocity(
    dit: DiT, x: Latents, t: Float[Array, "b f"], said: Prompts, cfg: DMDConfig, mesh: Mesh
) -> Latents:
    """What a score says of a clip: chunk by chunk, or of all frames at once, which then have the
    first one's timestep, and see all prompts one after the other.
    """
    kernel = dit.head.kernel[...]
    b, f = t.shape
    video = _video(f, cfg)
    context = said.context.astype(kernel.dtype)
    if cfg.causal:
        segment = _segments(said.prompt, f, cfg)
    else:
        context = context.reshape(b, 1, -1, context.shape[-1])
        segment, t = jnp.zeros((b, 1), jnp.int32), t[:, :1]
    shown, times, labels = x, t, video
    position = jnp.broadcast_to(jnp.arange(f, dtype=jnp.float32), (b, f))
    if said.before is not None:
        shown = jnp.concatenate([said.before.astype(x.dtype), x], 1)
        times = jnp.concatenate([jnp.zeros_like(t), t], 1)
        labels, position = mask.teacher_forcing(video), jnp.tile(position, (1, 2))
        segment = jnp.tile(segment, (1, 2))
    text = dit.text_kv(context)
    text = TextKV(text.k, text.v, jnp.broadcast_to(segment, (text.k.shape[0], *segment.shape)))
    rows, columns = (n // p for n, p in zip(x.shape[2:4], dit.cfg.patch[1:], strict=True))
    angles = phases(dit.cfg, position, rows, columns)
    attn = Ulysses(angles, as_table(mask.table(labels)), mesh, cfg.attention)
    given = sharding.frames(shown.astype(kernel.dtype), mesh)
    v, _ = dit(given, times, text, attn, remat="nothing")
    return v[:, -f:]


def _video(frames: int, cfg: DMDConfig) -> mask.Labels:
    """Scores know no shorter first chunk, in the released code."""
    return mask.clean(frames, cfg.chunk if cfg.causal else frames)


def _segments(prompt: Int[Array, "b n"], frames: int, cfg: DMDConfig) -> Int[Array, "b s"]:
    """Equal pieces of the clip, each under one prompt: chunks, or frames where the first chunk is
    shorter.
    """
    if cfg.first in (None, cfg.chunk):
        return prompt
    lengths = np.array([stop - start for start, stop in cfg.spans(frames)])
    return jnp.repeat(prompt, lengths, axis=1, total_repeat_length=frames)


def critic_loss(
    fake: DiT, shown: Shown, said: Prompts, cfg: DMDConfig, mesh: Mesh
) -> Float[Array, ""]:
    """How far what the fake score says of the student's clips is from what they are
    (`DMD.critic_loss`): mean square of velocities, all noise levels alike. Its velocity is that of
    the clean clip which it sees, so that two tables show as they do in the released code.
    """
    x0 = clean_of(fake, shown.noisy, shown.t, said=said, cfg=cfg, mesh=mesh)
    sigma = cfg.table.sigma(shown.t)[:, :, None, None, None]
    v = (shown.noisy.astype(jnp.float32) - x0) / sigma
    error = (v - flow.target(shown.clean, shown.noise).astype(jnp.float32)) ** 2
    return jnp.sum(error.mean((2, 3, 4)) * shown.counts) / jnp.maximum(shown.counts.sum(), 1.0)


def check(student: DiT, score: DiT, name: str) -> None:
    """Raises InputError where a score cannot judge a student's clips."""
    for word, of in (("latent channels", "channels"), ("text width", "text_dim")):
        ours, theirs = getattr(student.cfg, of), getattr(score.cfg, of)
        if ours != theirs:
            raise InputError(f"the {name} has {theirs} {word}, the student {ours}")


def check_attention(score: DiT, frames: int, tokens: int, cfg: DMDConfig, dtype: Any) -> None:
    """Raises InputError where `cfg.attention` cannot attend a clip of so many latent frames, of so
    many tokens each, here. Nothing is computed.
    """
    table = as_table(mask.table(_video(frames, cfg)))
    shape = (1, frames * tokens, score.cfg.heads, score.cfg.head_dim)
    parallel.check(shape, table, cfg.attention, dtype)
