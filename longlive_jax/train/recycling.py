"""Error recycling (LongLive 2.0 appendix C, after Stable Video Infinity, arXiv 2510.09212): what a
model got wrong in earlier steps is added to what it is shown, so that it learns to go on from
videos of its own. What it should say stays the true video.

    latent error   x0_pred - x0               added to the clean video, as context and before it is
                                              made noisy
    noise error    (v - target) (1 - sigma)   added to the noise

An error is of one chunk. It is shown at the position in the video where it was made; to a noisy
chunk, at about the noise level where it was made; to a context, whose generation goes through all
noise levels, from any of them.

All of it happens on the host, in numpy, between the steps. Chance is a function of the seed, the
step and the place in the batch, never of the calls before: a run that was resumed draws the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from longlive_jax.errors import InputError
from longlive_jax.flow import TRAIN_STEPS, Flow
from longlive_jax.train.ar import Latents, Task

Entry = Float[np.ndarray, "chunk h w c"]
Host = Float[np.ndarray, "b f h w c"]
Shown = Float[Array, "*parts b f h w c"]


def _random(entries: list[np.ndarray], entry: np.ndarray, rng: np.random.Generator) -> None:
    entries[rng.integers(len(entries))] = entry


def _fifo(entries: list[np.ndarray], entry: np.ndarray, rng: np.random.Generator) -> None:
    entries.append(entry)
    del entries[0]


def _l2(entries: list[np.ndarray], entry: np.ndarray, rng: np.random.Generator) -> None:
    """One at a time: all of a bucket in float32 are gigabytes."""
    new = entry.astype(np.float32)
    entries[np.argmin([np.linalg.norm(old.astype(np.float32) - new) for old in entries])] = entry


# What a full bucket gives up for a new entry: any, the oldest, the one most like it.
REPLACE = {"random": _random, "fifo": _fifo, "l2": _l2}


@dataclasses.dataclass(frozen=True)
class RecyclingConfig:
    """What is kept and how often it is shown. The values of LongLive 2.0 are the defaults."""

    buckets: int = 50  # of timesteps: equal parts of the table
    size: int = 500  # entries of a bucket at a position
    # Chunks of a video that are told apart, the last for all after it: 96 latent frames have 12.
    # With 1, as in the released configs, only timesteps are.
    positions: int = 12
    # How often a video that is not left clean is shown errors, by where they are added.
    context_inject: float = 0.9
    latent_inject: float = 0.9
    noise_inject: float = 0.01
    clean_prob: float = 0.2  # of a video to be left clean
    clean_buffer_update: float = 0.1  # of what is learned from it to be kept: such errors are small
    modulate: float = 0.3  # errors are shown times 1 - modulate to 1 + modulate
    warmup: int = 50  # steps in which every process keeps the errors of all
    replacement: str = "random"
    dtype: str = "bfloat16"  # of entries

    def __post_init__(self):
        for name in ("buckets", "size", "positions"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, not {getattr(self, name)}")
        shares = ("context_inject", "latent_inject", "noise_inject", "clean_prob")
        for name in (*shares, "clean_buffer_update", "modulate"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        if self.replacement not in REPLACE:
            known = ", ".join(REPLACE)
            raise InputError(f"replacement {self.replacement!r}: choose one of {known}")


def bucket(index: int, buckets: int) -> int:
    """The bucket of an entry of the table of timesteps; bucket 0 has the noisiest."""
    return min(max(index * buckets // TRAIN_STEPS, 0), buckets - 1)


def nearest(buckets: int, rank: int, size: int) -> Int[np.ndarray, " buckets"]:
    """For each bucket the nearest that the rank owns, the higher of two: those that are `rank`
    modulo `size`. Raises InputError for a rank that owns none.
    """
    owned = np.arange(rank, buckets, size)[::-1]
    if not len(owned):
        raise InputError(f"rank {rank} of {size} owns none of {buckets} buckets")
    return owned[np.abs(owned - np.arange(buckets)[:, None]).argmin(1)]


STATE = ("added", "count", "entries")  # what a buffer is saved as


@dataclasses.dataclass(frozen=True)
class Fill:
    """How full a buffer is."""

    added: int  # since training began, also what was replaced since
    entries: int
    filled: int  # buckets that are not empty, of all positions
    buckets: int  # that are owned, of all positions


class ErrorBuffer:
    """Errors of chunks by position in the video and bucket of the timestep, of the buckets that a
    rank owns (`utils/error_buffer.py:ErrorBuffer`).

    Memory grows with the entries. One of the 5B model, 8 x 44 x 80 x 48 in bfloat16, is 2.7 MB: a
    bucket holds 1.35 GB, a position 68 GB, 12 positions 811 GB, and there are two buffers. No run
    fills them: 600 steps of one 12-chunk video put at most 7200 entries, 19 GB, into each.

    That is why a state is not of the full size either: it has the entries end to end and how many
    there are in each bucket. So its shapes change from one save to the next, and it is restored
    without naming any. It is a copy, and as large as the entries.
    """

    def __init__(self, cfg: RecyclingConfig, shape: tuple[int, ...], rank: int = 0, size: int = 1):
        """shape: of an entry, chunk h w c."""
        self.cfg, self.shape, self.dtype = cfg, shape, jnp.dtype(cfg.dtype)
        self._nearest = nearest(cfg.buckets, rank, size)
        self._owned = np.unique(self._nearest).tolist()
        keys = ((p, b) for p in range(cfg.positions) for b in self._owned)
        self._entries: dict[tuple[int, int], list[np.ndarray]] = {key: [] for key in keys}
        self.added = 0

    def add(self, entry: Entry, index: int, position: int, rng: np.random.Generator) -> None:
        """Keeps an error made at an entry of the table of timesteps, if its bucket is owned."""
        key = self._position(position), bucket(index, self.cfg.buckets)
        entries = self._entries.get(key)
        if entries is None:
            return
        entry = np.array(entry, self.dtype)  # a copy: the step's arrays are not kept alive
        if len(entries) < self.cfg.size:
            entries.append(entry)
        else:
            REPLACE[self.cfg.replacement](entries, entry, rng)
        self.added += 1

    def sample(self, index: int, position: int, rng: np.random.Generator) -> Entry:
        """An error of this position and of the owned bucket nearest to this table entry's, float32;
        0 where there is none.
        """
        near = int(self._nearest[bucket(index, self.cfg.buckets)])
        return self._pick(self._entries[self._position(position), near], rng)

    def sample_any(self, position: int, rng: np.random.Generator) -> Entry:
        """An error of this position and any owned bucket: each entry is as likely."""
        place = self._position(position)
        return self._pick([e for b in self._owned for e in self._entries[place, b]], rng)

    def fill(self) -> Fill:
        counts = [len(entries) for entries in self._entries.values()]
        return Fill(self.added, sum(counts), sum(n > 0 for n in counts), len(counts))

    def state(self) -> dict[str, np.ndarray]:
        """A copy of what is kept: `count`, positions x buckets, and that many `entries` of each in
        this order; a row of zeros if there are none, as Orbax saves no empty array.
        """
        count = np.zeros((self.cfg.positions, self.cfg.buckets), np.int32)
        for key, entries in self._entries.items():
            count[key] = len(entries)
        kept = [entry for entries in self._entries.values() for entry in entries]
        packed = np.stack(kept or [np.zeros(self.shape, self.dtype)])
        return dict(zip(STATE, (np.array(self.added, np.int64), count, packed), strict=True))

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes a state, less the buckets that are not owned. Raises InputError, and changes
        nothing, where it is of other positions, buckets or latents.
        """
        count, packed = state["count"], state["entries"]
        wanted = (self.cfg.positions, self.cfg.buckets, *self.shape)
        if (*count.shape, *packed.shape[1:]) != wanted or count.max() > self.cfg.size:
            raise InputError(
                f"saved errors are {count.shape[0]} positions x {count.shape[1]} buckets of up to"
                f" {count.max()} entries of shape {packed.shape[1:]}; this run has"
                f" {self.cfg.positions} x {self.cfg.buckets} of up to {self.cfg.size} of shape"
                f" {self.shape}"
            )
        end = np.cumsum(count).reshape(count.shape)
        for key in self._entries:
            rows = packed[end[key] - count[key] : end[key]]
            self._entries[key] = [np.array(row, self.dtype) for row in rows]
        self.added = int(state["added"])

    def _position(self, position: int) -> int:
        return min(position, self.cfg.positions - 1)

    def _pick(self, entries: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
        if not entries:
            return np.zeros(self.shape, np.float32)
        factor = rng.uniform(1 - self.cfg.modulate, 1 + self.cfg.modulate)
        return factor * entries[rng.integers(len(entries))].astype(np.float32)


def mistakes(v: Latents, made: Task, clean: Latents, levels: Flow) -> tuple[Array, Array]:
    """A step's latent and noise errors, b f h w c in the dtype of `v`; for the device. Both are 0
    in frames that do not count: a frame that was given is shown as it is, so nothing is learned of
    it. (`model/diffusion.py` keeps what the model says there.)
    """
    counts = (made.counts > 0)[..., None, None, None]
    said = v.astype(jnp.float32)
    latent = levels.to_x0(said, made.noisy, made.t) - clean.astype(jnp.float32)
    sigma = levels.sigma(made.t)[..., None, None, None]
    noise = (said - made.target.astype(jnp.float32)) * (1.0 - sigma)
    latent, noise = (jnp.where(counts, error, 0.0).astype(v.dtype) for error in (latent, noise))
    return latent, noise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Errors:
    """What is added to what a model is shown: these fields of `ar.Draws`, float32. 0 where nothing
    is added, None only where a config never adds any: all steps of a run have the same signature.
    """

    error: Host | Shown | None
    noise_error: Host | Shown | None
    context_error: Host | Shown | None


@dataclasses.dataclass(frozen=True)
class Part:
    """What a process has of the videos of a step, and of the buckets."""

    video: int = 0  # where its videos begin in the batch
    chunk: int = 0  # and its chunks in a video
    rank: int = 0  # it owns the buckets that are `rank` modulo `size`
    size: int = 1


USES = ("lots", "error", "noise_error", "context_error", "latent", "noise")  # of chance


class Recycler:
    """The two buffers of a process, and what a training step does with them: `inject` before it,
    `update` after it (`model/diffusion.py:CausalDiffusion.generator_loss`, which decides for all
    videos of a rank at once; here each decides for itself).

    Frames are those of the process, b f, in whole chunks; b is all videos of a step, also where
    they go through the model in parts.
    """

    def __init__(
        self,
        cfg: RecyclingConfig,
        shape: tuple[int, ...],
        levels: Flow,
        seed: int,
        *,
        part: Part | None = None,
        gather: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    ):
        """shape: of a chunk of latents, chunk h w c. gather: joins the arrays b … of all processes
        that have the same chunks, to one for each of them. It is called in every step of the
        warm-up, whatever was decided, as they all must call it together.
        """
        self.cfg, self.shape, self.levels, self.seed = cfg, shape, levels, seed
        self.part, self.gather = part or Part(), gather
        self.buffers = {
            use: ErrorBuffer(cfg, shape, self.part.rank, self.part.size)
            for use in ("latent", "noise")
        }

    def inject(self, step: int, t: Float[np.ndarray, "b f"]) -> Errors:
        """Errors for a step with these timesteps."""
        index, lots, cfg = self._index(t), self._lots(step, len(t)), self.cfg
        latent, noise = self.buffers["latent"], self.buffers["noise"]

        def shown(use: str, probability: float, pick: Callable[..., np.ndarray]) -> Host | None:
            if probability == 0:
                return None
            out = np.zeros((*index.shape, *self.shape), np.float32)
            chosen = np.broadcast_to(lots[use][:, None], index.shape)
            for video, chunk in np.argwhere(chosen).tolist():
                position = self.part.chunk + chunk
                rng = self._rng(step, use, self.part.video + video, position)
                out[video, chunk] = pick(int(index[video, chunk]), position, rng)
            return out.reshape(*t.shape, *self.shape[1:])

        return Errors(
            shown("error", cfg.latent_inject, latent.sample),
            shown("noise_error", cfg.noise_inject, noise.sample),
            shown("context_error", cfg.context_inject, lambda _, *at: latent.sample_any(*at)),
        )

    def update(
        self,
        step: int,
        t: Float[np.ndarray, "b f"],
        latent: Host,
        noise: Host,
        valid: Float[np.ndarray, "b f"],
    ) -> None:
        """Keeps what the step got wrong, `mistakes`. Of a video that was left clean it is kept more
        seldom, and never of a chunk with frames that are not valid: there was no video.
        """
        index = self._index(t)
        whole = valid.reshape(*index.shape, -1).min(-1) > 0
        gather = self.gather if step < self.cfg.warmup else lambda x: x
        keep = gather(whole & self._lots(step, len(t))["keep"][:, None])
        index = gather(index)
        for use, errors in (("latent", latent), ("noise", noise)):
            buffer = self.buffers[use]
            chunks = gather(errors.reshape(len(t), -1, *self.shape).astype(buffer.dtype))
            rng = self._rng(step, use, self.part.video, self.part.chunk)
            for video, chunk in np.argwhere(keep).tolist():  # all chunks of a video, then the next
                position = self.part.chunk + chunk
                buffer.add(chunks[video, chunk], int(index[video, chunk]), position, rng)

    def state(self) -> dict[str, np.ndarray]:
        """Both buffers. They are of this process: another's are others."""
        states = {use: buffer.state() for use, buffer in self.buffers.items()}
        return {f"{use}_{name}": x for use, state in states.items() for name, x in state.items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        for use, buffer in self.buffers.items():
            buffer.restore({name: state[f"{use}_{name}"] for name in STATE})

    def _index(self, t: Float[np.ndarray, "b f"]) -> Int[np.ndarray, "b n"]:
        """Table entry of each chunk, from its last frame: the first of a video may be given."""
        last = t[:, self.shape[0] - 1 :: self.shape[0], None]
        return np.abs(self.levels.timesteps - last).argmin(-1).astype(np.int32)

    def _lots(self, step: int, videos: int) -> dict[str, Bool[np.ndarray, " b"]]:
        """Which videos are shown which errors, and which are learned from: the same in all
        processes that have a part of a video.
        """
        cfg = self.cfg
        rngs = [self._rng(step, "lots", self.part.video + video) for video in range(videos)]
        clean, latent, noise, context, kept = np.stack([rng.random(5) for rng in rngs], 1)
        dirty = clean >= cfg.clean_prob
        return {
            "error": dirty & (latent < cfg.latent_inject),
            "noise_error": dirty & (noise < cfg.noise_inject),
            "context_error": dirty & (context < cfg.context_inject),
            "keep": dirty | (kept < cfg.clean_buffer_update),
        }

    def _rng(self, step: int, use: str, video: int, chunk: int = 0) -> np.random.Generator:
        return np.random.default_rng((self.seed, step, USES.index(use), video, chunk))
