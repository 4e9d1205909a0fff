"""Training sequences put together from clips: which frames of which files, under which prompts
(LongLive 2.0 `utils/dataset.py:MultiVideoConcatDataset`). Nothing is decoded here.

A sequence is a row of chunks, and a chunk lies in one clip: what is left of a clip and shorter than
a chunk is dropped, and the next clip begins at its first frame. A chunk that does not go on where
the one before it ended begins a shot; its prompt has the prefix of a cut.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from longlive_jax.config import ModelConfig
from longlive_jax.errors import InputError
from longlive_jax.events import CUT_PREFIX

PLACES = 50  # about how many places in a clip a sequence may begin at (`_sample_random_start`)

Start = tuple[int, int]  # a clip, and a frame of it


@dataclasses.dataclass(frozen=True)
class MontageConfig:
    """What sequences are made of. Their first chunk is `time_stride - 1` frames shorter than the
    others, as the VAE has it.

    shot: at most so many chunks in a row are of one clip; then a second of it is left out, which
    makes a cut (`max_chunks_per_shot`). 0 is any number.
    """

    chunks: int
    chunk: int  # latent frames
    fps: int  # at which clips of any rate are read
    time_stride: int = 4  # frames of a latent frame
    shot: int = 0
    one_clip: bool = False  # a sequence stays in one clip (`uniform_prompt`)
    pad: bool = False  # a sequence may end early: its last frame is repeated (`allow_padding`)
    least: int = 0  # latent frames that are not padding (`min_latent_frames`)

    def __post_init__(self):
        for name in ("chunks", "chunk", "fps", "time_stride"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("shot", "least"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be 0 or more, not {getattr(self, name)}")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Frames of every chunk."""
        whole = self.chunk * self.time_stride
        return (whole - self.time_stride + 1, *[whole] * (self.chunks - 1))

    @property
    def frames(self) -> int:
        return sum(self.lengths)

    @property
    def latents(self) -> int:
        return self.chunks * self.chunk


def for_model(config: ModelConfig, chunks: int, **choices) -> MontageConfig:
    """Sequences of so many of a model's chunks, at its rate; `choices` are the other fields."""
    own = dict(chunk=config.stream.chunk, fps=config.fps, time_stride=config.vae.time_stride)
    return MontageConfig(chunks, **(own | choices))


@dataclasses.dataclass(frozen=True)
class Clip:
    """A file that shows one shot."""

    file: str
    frames: int
    fps: float
    prompt: str


@dataclasses.dataclass(frozen=True)
class Window:
    """A chunk's frames: `count` of them at the sequence's rate, from one frame of a file on."""

    file: str
    start: int  # counted in the file's own frames
    count: int

    def indices(self, step: float) -> list[int]:
        """The file's frames that are read; step: how many it has for each of the sequence."""
        return [round(self.start + n * step) for n in range(self.count)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sequence before it is read.

    reason: why there is none, "" where there is one; then `windows` is how far it came.
    """

    windows: tuple[Window, ...]
    prompts: tuple[str, ...]  # of every chunk; padding has the last one's, its prefix included
    valid: int  # latent frames that are not padding
    reason: str = ""


def holds(clip: Clip, start: int, count: int, fps: int) -> bool:
    """Whether so many frames at `fps` lie in a clip from its frame `start` on."""
    return round(start + (count - 1) * (clip.fps / fps)) < clip.frames


def plan(clips: Sequence[Clip], cfg: MontageConfig, start: Start = (0, 0)) -> Plan:
    """The sequence of a sample's clips, in order, that begins at `start`."""
    windows: list[Window] = []
    prompts: list[str] = []
    (at, frame), run = start, 0  # run: chunks since the last cut
    end = min(at + 1, len(clips)) if cfg.one_clip else len(clips)
    for count in cfg.lengths:
        if cfg.shot and run == cfg.shot:
            frame, run = frame + round(clips[at].fps), 0
        while at < end and not holds(clips[at], frame, count, cfg.fps):
            at, frame, run = at + 1, 0, 0
        if at >= end:
            break
        clip = clips[at]
        prompts.append(CUT_PREFIX + clip.prompt if windows and not run else clip.prompt)
        windows.append(Window(clip.file, frame, count))
        frame, run = round(frame + count * (clip.fps / cfg.fps)), run + 1
    valid = cfg.chunk * len(windows)
    reason = _reason(len(clips), len(windows), valid, cfg)
    prompts += prompts[-1:] * (cfg.chunks - len(windows))
    return Plan(tuple(windows), () if reason else tuple(prompts), valid, reason)


def _reason(clips: int, windows: int, valid: int, cfg: MontageConfig) -> str:
    if not clips:
        return "no videos with captions"
    if not windows:
        return "no video can provide the first chunk"
    if windows < cfg.chunks and not cfg.pad:
        return "remaining videos are too short for the next chunk"
    return f"only {valid} latent frames, fewer than {cfg.least}" if valid < cfg.least else ""


def starts(clips: Sequence[Clip], cfg: MontageConfig) -> list[Start]:
    """Places spread over the clips from which a sequence is whole, without padding."""
    whole = dataclasses.replace(cfg, pad=False)
    found: list[Start] = []
    for at, clip in enumerate(clips):
        last = math.floor(clip.frames - 1 - (cfg.lengths[0] - 1) * clip.fps / cfg.fps)
        places = [(at, frame) for frame in range(0, last + 1, max(1, last // PLACES))]
        found += [start for start in places if not plan(clips, whole, start).reason]
    return found
