"""A stand-in for a model: it streams grey frames at once, so that tests see what is around it."""

import dataclasses
import os
import signal

import numpy as np

from longlive_jax import config as configs
from longlive_jax import timeline
from longlive_jax.report import Switch

CONFIG = configs.ModelConfig(
    name="fake",
    dit=configs.DiTConfig(dim=8, ffn_dim=8, heads=1, layers=1, channels=4, text_dim=8, text_len=8),
    vae=configs.VAEConfig(
        latent_channels=4,
        encoder_dim=8,
        decoder_dim=8,
        multipliers=(1,),
        res_blocks=1,
        strides=((4, 8),),
    ),
    text=configs.TextConfig(vocab=8, dim=8, attn_dim=8, ffn_dim=8, heads=1, layers=1),
    stream=configs.StreamConfig(chunk=3, window=12, sink=3),
    sampler=configs.SamplerConfig(solver="unipc", steps=4, shift=5.0),
    height=64,
    width=64,
    fps=16,
)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What `stream` yields."""

    frames: np.ndarray
    prompt: str
    index: int
    denoise_s: float
    applied: tuple[Switch, ...]


@dataclasses.dataclass
class Model:
    """Streams frames of one grey per chunk; `interrupt_at` presses Ctrl-C before that chunk."""

    config: configs.ModelConfig = CONFIG
    interrupt_at: int | None = None
    noise: bool = False  # frames that no encoder can make small
    calls: list = dataclasses.field(default_factory=list)

    def stream(self, prompt, seconds=10, seed=0, steps=None, events=()):
        self.calls.append((prompt, seconds, seed, steps, tuple(events)))
        frames = timeline.frame_count(self.config, seconds)
        starts = [0, *timeline.chunk_starts(self.config, frames)]
        waiting = list(events)
        random = np.random.default_rng(seed)
        for index, (start, stop) in enumerate(zip(starts, [*starts[1:], frames], strict=True)):
            if index == self.interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)
            now = [event for event in waiting if event.time_s <= start / self.config.fps]
            waiting = waiting[len(now) :]
            prompt = now[-1].prompt if now else prompt
            shape = (stop - start, self.config.height, self.config.width, 3)
            picture = np.full(shape, (40 * index) % 256, np.uint8)
            yield Chunk(
                frames=random.integers(0, 256, shape, np.uint8) if self.noise else picture,
                prompt=prompt,
                index=index,
                denoise_s=0.001,
                applied=tuple(Switch(e.prompt, e.time_s, start / self.config.fps) for e in now),
            )
