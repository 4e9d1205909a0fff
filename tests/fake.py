"""A stand-in for a model: it streams grey frames at once, so that tests see what is around it."""

import dataclasses
import os
import signal

import numpy as np

from longlive_jax import config as configs
from longlive_jax import sampler, timeline
from longlive_jax.model import Origin
from longlive_jax.session import Chunk, Receipt

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


@dataclasses.dataclass
class Session:
    """Hands out frames of one grey per chunk."""

    model: "Model"
    prompt: str
    seed: int
    steps: int
    last: Chunk | None = None
    frame: int = 0
    notes: tuple[str, ...] = ()

    @property
    def solver(self):
        step = sampler.Step(0.0, 0.0, sampler.KEEP, sampler.KEEP[:4])
        return sampler.Solver((step,) * self.steps)

    def prepare(self, *modes):
        return self

    def save(self, folder):
        self.model.saved.append(folder)

    def stream(self, seconds, events=(), lookahead=0):
        model, config = self.model, self.model.config
        model.calls.append((self.prompt, seconds, self.seed, self.steps, tuple(events)))
        frames = timeline.frame_count(config, seconds)
        starts = [0, *timeline.chunk_starts(config, frames)]
        waiting = list(events)
        random = np.random.default_rng(self.seed)
        for index, (start, stop) in enumerate(zip(starts, [*starts[1:], frames], strict=True)):
            if index == model.interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)
            now = [event for event in waiting if event.time_s <= start / config.fps]
            waiting = waiting[len(now) :]
            self.prompt = now[-1].prompt if now else self.prompt
            self.notes += tuple(filter(None, (model.prompt_note(e.prompt) for e in now)))
            shape = (stop - start, config.height, config.width, 3)
            changes = tuple(Receipt(e.kind, e.mode, e.prompt, start) for e in now)
            self.last = Chunk(index, start, self.prompt, changes, 0.001)
            picture = np.full(shape, (40 * index) % 256, np.uint8)
            self.frame = stop
            yield random.integers(0, 256, shape, np.uint8) if model.noise else picture


@dataclasses.dataclass
class Model:
    """Streams frames at once; `interrupt_at` presses Ctrl-C before that chunk."""

    config: configs.ModelConfig = CONFIG
    origin: Origin = Origin("fake")
    interrupt_at: int | None = None
    noise: bool = False  # frames that no encoder can make small
    calls: list = dataclasses.field(default_factory=list)
    streamed: list = dataclasses.field(default_factory=list)
    saved: list = dataclasses.field(default_factory=list)
    begun: list = dataclasses.field(default_factory=list)
    unread: tuple[str, ...] = ()  # prompts that it has a note about

    def prompt_note(self, prompt):
        return f"unread: {prompt}" if prompt in self.unread else ""

    def streaming(self, **changes):
        self.streamed.append(changes)
        return self

    def session(self, prompt, *, seed=0, steps=None, image=None, video=None):
        self.begun.append((image, video))
        notes = tuple(filter(None, (self.prompt_note(prompt),)))
        return Session(self, prompt, seed, steps or self.config.sampler.steps, notes=notes)
