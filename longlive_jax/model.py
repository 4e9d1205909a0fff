"""A whole text-to-video system: its weights, where they come from, and the loop that plays them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, UInt8

from longlive_jax import config, sampler, session, timeline, weights
from longlive_jax import lora as loras
from longlive_jax.config import ModelConfig, TAEConfig, VAEConfig
from longlive_jax.convert.table import NameMismatch
from longlive_jax.dit.model import DiT, TextKV
from longlive_jax.errors import InputError
from longlive_jax.events import Event, in_order
from longlive_jax.report import Switch
from longlive_jax.text import tokenizer
from longlive_jax.text.encoder import TextEncoder
from longlive_jax.text.umt5 import UMT5
from longlive_jax.vae import build as vaes
from longlive_jax.vae.tae import TAE
from longlive_jax.vae.vae import VAE

CUT_PREFIX = "The scene transitions. "  # LongLive 2.0 section 4.2
SHIPPED = pathlib.Path(__file__).parent / "models"
PARTS = ("dit", "text", "vae")
# Where a parameter goes, of its part, path and shape.
Sharding = Callable[[str, str, tuple[int, ...]], jax.sharding.Sharding]

_TOKENIZERS = ("tokenizer.json", "spiece.model")
_WORDS = {"dit": "transformer", "text": "text encoder", "vae": "VAE"}
_WORDS |= {"vae_light": "light VAE", "vae_tae": "TAEHV decoder"}


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of video as it comes."""

    index: int
    frames: UInt8[np.ndarray, "t H W 3"]
    prompt: str  # in force
    denoise_s: float  # seconds until the latents were there
    applied: tuple[Switch, ...]  # changes that begin here


@dataclasses.dataclass(frozen=True)
class Model:
    """Weights and config. Everything that changes while a video is made is in a
    `session.Session`.
    """

    config: ModelConfig
    dit: DiT
    vae: VAE | TAE
    text: TextEncoder

    def prompt_kv(self, prompts: Sequence[str]) -> TextKV:
        """Cross-attention keys and values of one prompt per video, the unconditional rows after
        them under guidance.
        """
        branches = self.config.sampler.branches
        rows = [*prompts, *[""] * len(prompts) * (branches - 1)]
        return _text_kv(self.dit, self.text(rows))

    def stream(
        self,
        prompt: str,
        seconds: float | int = 10,
        *,
        seed: int = 0,
        steps: int | None = None,
        events: Sequence[Event] = (),
    ) -> Iterator[Chunk]:
        """Makes a video chunk by chunk; together the chunks have exactly round(seconds * fps)
        frames.

        An event applies at the first chunk whose first frame is at or after its time. A "switch"
        re-reads the window under the new prompt (recache); a "cut" starts a new shot, with
        `CUT_PREFIX` before the prompt.

        Raises:
          InputError: the prompt is empty, or the length or an event makes no sense.
        """
        if not prompt.strip():
            raise InputError("the prompt is empty")
        events = in_order(events, seconds)
        total = timeline.frame_count(self.config, seconds)
        starts = [0, *timeline.chunk_starts(self.config, total)]
        return self._play(prompt, starts, total, seed, self.solver(steps), list(events))

    def solver(self, steps: int | None = None) -> sampler.Solver:
        """The config's solver, with its own number of steps or another."""
        cfg = self.config.sampler
        return sampler.make(cfg if steps is None else dataclasses.replace(cfg, steps=steps))

    def _play(self, prompt, starts, total, seed, solver, events) -> Iterator[Chunk]:
        cfg = self.config
        text = self.prompt_kv([prompt])
        state = session.begin(cfg, self.vae, batch=1, seed=seed, dtype=text.k.dtype)
        nobody = np.zeros(1, bool)
        for kind in {event.kind for event in events}:  # compiled now, not while the video plays
            state, _ = self.change(state, kind, [prompt], nobody)
        for index, first in enumerate(starts):
            applied = []
            while events and events[0].time_s * cfg.fps <= first:
                event = events.pop(0)
                prompt = event.prompt
                whole = CUT_PREFIX + prompt if event.kind == "cut" else prompt
                state, text = self.change(state, event.kind, [whole])
                applied.append(Switch(prompt, event.time_s, first / cfg.fps))
            start = time.perf_counter()
            state, latents = self.next_latents(state, text, solver)
            jax.block_until_ready(latents)
            spent = time.perf_counter() - start
            state, pixels = session.decode(self.vae, state, latents, first=index == 0)
            frames = np.asarray(pixels)[0, : total - first]
            yield Chunk(index, frames, prompt, spent, tuple(applied))

    def next_latents(self, state: session.Session, text: TextKV, solver: sampler.Solver):
        """The next chunk's latents, and the session that remembers them."""
        noise = session.noise(state, self.config.stream.chunk)
        return session.generate(
            self.dit,
            state,
            text,
            noise,
            stream=self.config.stream,
            solver=solver,
            guidance=self.config.sampler.guidance,
        )

    def change(
        self,
        state: session.Session,
        kind: str,
        prompts: Sequence[str],
        rows: Bool[np.ndarray, " b"] | None = None,
    ) -> tuple[session.Session, TextKV]:
        """Puts prompts in force from the next chunk on, by a "switch" or a "cut".

        prompts: of every video, whole. rows: the videos that change; the others keep their memory.
        None is all.
        """
        text = self.prompt_kv(prompts)
        rows = jnp.asarray(np.ones(len(prompts), bool) if rows is None else rows)
        if kind == "cut":
            return dataclasses.replace(state, shot=state.shot + rows.astype(jnp.int32)), text
        return session.recache(self.dit, state, text, rows, stream=self.config.stream), text


@jax.jit
def _text_kv(dit: DiT, text: jax.Array) -> TextKV:
    return dit.text_kv(text[:, None])


def load(
    name: str | os.PathLike = "tiny",
    *,
    dtype=None,
    sharding: Sharding | None = None,
    vae: str = "full",
    lora: str | os.PathLike | None = None,
) -> Model:
    """The model that ships with the package ("tiny"), or one in a folder: config.json, weights,
    tokenizer. Parameters go from the files to their devices one at a time.

    dtype: of the weights; None is float32 on a CPU and bfloat16 on an accelerator. sharding: where
    a parameter goes, of its part ("dit", "text", "vae"), path and shape; None is the default
    device. vae: "full", or the name of a faster decoder that the folder has ("light", "tae"). lora:
    a LoRA file that is applied unmerged, in place of the folder's own `lora.safetensors`.

    Raises:
      InputError: there is no such model, or a part of it is missing or broken.
    """
    folder = SHIPPED / name if name == "tiny" else pathlib.Path(name)
    cfg = _config(folder)
    decoder = _decoder(folder, cfg, vae)
    build = {
        "dit": lambda: DiT(cfg.dit, rngs=nnx.Rngs(0)),
        "text": lambda: UMT5(cfg.text, rngs=nnx.Rngs(0)),
        "vae": lambda: vaes.build(decoder, rngs=nnx.Rngs(0)),
    }
    files = {"dit": "dit", "text": "text", "vae": "vae" if vae == "full" else f"vae_{vae}"}
    _check_parts(folder, files)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    parts = {}
    try:
        words = tokenizer.load(folder, cfg.dit.text_len)
        for part, file in files.items():
            where = sharding and functools.partial(sharding, part)
            tensors = weights.read(folder, file)
            abstract = nnx.eval_shape(build[part])
            parts[part] = weights.place(abstract, tensors, dtype=dtype, sharding=where)
    except NameMismatch as error:
        raise InputError(f'"{folder}" does not fit its config.json: {file}: {error}') from error
    except InputError:
        raise
    except (ValueError, OSError) as error:
        raise InputError(f'the model in "{folder}" cannot be read: {error}') from error
    own = folder / "lora.safetensors"
    if lora is not None or own.is_file():
        adapter = loras.read(own if lora is None else lora)
        adapter = jax.tree.map(lambda x: jnp.array(x, dtype), adapter)
        parts["dit"] = loras.apply(parts["dit"], adapter)
    text = TextEncoder(parts["text"], words, cfg.dit.text_len)
    return Model(cfg, parts["dit"], parts["vae"], text)


def _config(folder: pathlib.Path) -> ModelConfig:
    path = folder / "config.json"
    try:
        return config.from_json(json.loads(path.read_text("utf-8")))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f'"{folder}" is no model: config.json is missing') from error
    except KeyError as error:
        raise InputError(f'"{path}" is no model\'s config: it has no {error.args[0]}') from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f'"{path}" is no model\'s config: {error}') from error


def _decoder(folder: pathlib.Path, cfg: ModelConfig, name: str) -> VAEConfig | TAEConfig:
    try:
        return cfg.decoder(name)
    except KeyError as error:
        names = ", ".join(["full", *(decoder for decoder, _ in cfg.decoders)])
        raise InputError(f'the model in "{folder}" has no VAE "{name}", only {names}') from error


def _check_parts(folder: pathlib.Path, files: Mapping[str, str]) -> None:
    """A folder may hold only some parts of a model, as its source did."""
    absent = [_WORDS[file] for file in files.values() if not weights.exists(folder, file)]
    if not any((folder / file).exists() for file in _TOKENIZERS):
        absent.append("tokenizer")
    if absent:
        raise InputError(
            f'the model in "{folder}" lacks its {" and its ".join(absent)}: convert it again with a'
            f" checkpoint that has more (longlive convert --from {folder} --from MORE --to NEW)"
        )


def save(
    folder: pathlib.Path, cfg: ModelConfig, flat: dict[str, weights.Weights], dtype=jnp.bfloat16
) -> None:
    """Writes config and weights of a model; its tokenizer is a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        weights.save(folder / f"{part}.safetensors", flat[part], dtype)
    (folder / "config.json").write_text(json.dumps(config.to_json(cfg), indent=1) + "\n", "utf-8")
