"""A whole text-to-video system: its weights, and where they come from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax import (
    arguments,
    config,
    documents,
    opening,
    published,
    rollout,
    sampler,
    weights,
)
from longlive_jax import lora as loras
from longlive_jax.config import ModelConfig, Precision, TAEConfig, VAEConfig, folder_of
from longlive_jax.convert.table import NameMismatch, Pending
from longlive_jax.dit.model import DiT, TextKV
from longlive_jax.errors import InputError
from longlive_jax.lora_files import Choice, LoraFile, listed
from longlive_jax.opening import Pixels
from longlive_jax.session import Session
from longlive_jax.text import tokenizer
from longlive_jax.text.encoder import TextEncoder
from longlive_jax.text.umt5 import UMT5
from longlive_jax.vae import build as vaes
from longlive_jax.vae.tae import TAE
from longlive_jax.vae.vae import VAE

PARTS = ("dit", "text", "vae")
# Where a parameter goes, of its part, path and shape.
Sharding = Callable[[str, str, tuple[int, ...]], jax.sharding.Sharding]

_TOKENIZERS = ("tokenizer.json", "spiece.model")
_WORDS = {"dit": "transformer", "text": "text encoder", "vae": "VAE"}
_WORDS |= {"vae_light": "light VAE", "vae_tae": "TAEHV decoder"}


@dataclasses.dataclass(frozen=True)
class Origin:
    """The arguments of `load`. lora: None is the folder's own, if it has one; () is none.
    precision: what `Model.quantized` made of it.
    """

    name: str
    vae: str = "full"
    lora: tuple[LoraFile, ...] | None = None
    weights_only: bool = False
    precision: Precision | None = None


@dataclasses.dataclass(frozen=True)
class Model:
    """Weights and config. Everything that changes while a video is made is in a
    `session.Session`. notes: what of a LoRA is left out.
    """

    config: ModelConfig
    dit: DiT
    vae: VAE | TAE
    text: TextEncoder
    origin: Origin
    notes: tuple[str, ...] = ()

    def session(
        self,
        prompt: str,
        *,
        seed: int = 0,
        steps: int | None = None,
        image: Pixels | None = None,
        video: Pixels | None = None,
        history: int = 0,
        vae_device: jax.Device | None = None,
    ) -> Session:
        """Begins a video.

        Args:
          seed: From 0 to 2**32 - 1; the same seed and the same changes make the same video.
          steps: Denoising steps; None is the model's own number.
          image: What the video begins with: a file, a PIL image, or an array [H, W] or [H, W, c]
            of any library, uint8 or from 0 to 1; c is 1 to 4. Its latent is held clean.
          video: A clip that it continues: a file; or at the model's FPS a list of such pictures,
            or an array [t, H, W, c].
          history: Chunks that `Session.rewind` can take back.
          vae_device: Where chunks are decoded, while the next ones are denoised on the model's
            device.

        Raises:
          InputError: the prompt is empty, a number is out of range, or a picture cannot be read or
            is too short.
        """
        begin = functools.partial(opening.begin, self, prompt, seed=seed, steps=steps)
        return begin(image=image, video=video, history=history, vae_device=vae_device)

    def streaming(self, **changes: Any) -> Model:
        """The same weights with other values in `config.stream`, such as `rope="relative"` or
        `recache=Recache(sinks="keep")`.

        Raises:
          InputError: there is no such value, or the values do not go together.
        """
        try:
            stream = dataclasses.replace(self.config.stream, **changes)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
        config = dataclasses.replace(self.config, stream=stream)
        try:
            if stream.attention != "best":
                rollout.check_attention(config, self.dit.head.kernel[...].dtype)
        except NotImplementedError as error:
            raise InputError(f"attention: {error}") from error
        return dataclasses.replace(self, config=config)

    def quantized(self, precision: str | Precision, **choices: Any) -> Model:
        """The transformer's matrices in fewer bits: "int8", "fp8" or "nvfp4" for all of its blocks,
        with the other fields of `Precision`; or a `Precision` of layer by layer. Warns where a GPU
        only emulates what that says.

        Raises:
          InputError: there is no such value, it does not fit the matrices, or they are so already.
        """
        from longlive_jax.quant import transformer

        try:
            if isinstance(precision, str):
                precision = Precision.of(precision, **choices)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
        transformer.tell(precision)
        made = functools.partial(transformer.quantize, how=precision)
        dit = jax.jit(made)(self.dit)
        cfg = dataclasses.replace(self.config, precision=precision)
        made_by = dataclasses.replace(self.origin, precision=precision)
        return dataclasses.replace(self, config=cfg, dit=dit, origin=made_by)

    def adapted(self, lora: Choice) -> Model:
        """Return the model with LoRAs from files beside the transformer's weights, in place of any
        that were there; or with none.

        Args:
          lora: A file; or several, each a path or a pair of a path and a strength. Their changes
            are added up.

        Raises:
          InputError: there is no LoRA, or it is of another model.
        """
        files = listed(lora) or ()
        dit, notes = _adapted(self.dit, files)
        origin = dataclasses.replace(self.origin, lora=files)
        return dataclasses.replace(self, dit=dit, origin=origin, notes=notes)

    def prompt_kv(self, prompts: Sequence[str]) -> TextKV:
        """Cross-attention keys and values of one prompt per video, the unconditional rows after
        them under guidance.
        """
        branches = self.config.sampler.branches
        rows = [*prompts, *[""] * len(prompts) * (branches - 1)]
        return _text_kv(self.dit, self.text(rows))

    def prompt_note(self, prompt: str) -> str:
        """Say in one line what of a prompt the model does not read, such as words that it does not
        know or a tail beyond its tokens; an empty line for nothing.
        """
        return self.text.note(prompt)

    def solver(self, steps: int | None = None) -> sampler.Solver:
        """The config's solver, with its own number of steps or another.

        Raises:
          InputError: there are no such steps.
        """
        cfg = self.config.sampler
        if steps is not None:
            cfg = dataclasses.replace(cfg, steps=arguments.steps(steps))
        return sampler.make(cfg)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The same for models of the same config, with the same weights in the same types."""
        return _digest(config.to_json(self.config), (self.dit, self.vae, self.text.umt5))

    @functools.cached_property
    def vae_fingerprint(self) -> str:
        """The same for models whose latents are the same."""
        return _digest(dataclasses.asdict(self.config.vae), self.vae)


def _digest(facts: dict, parts: Any) -> str:
    digest = hashlib.sha256(json.dumps(facts).encode())
    for x in jax.device_get(_excerpts(parts)):
        digest.update(f"{x.dtype}".encode() + x.tobytes())
    return digest.hexdigest()[:16]


@jax.jit
def _excerpts(weights: Any) -> list[jax.Array]:
    """A row from the middle of every parameter: training and merging change all of them."""
    rows = (x[tuple(n // 2 for n in x.shape[:-1])] for x in jax.tree.leaves(weights))
    return [x.astype(jnp.float32) if x.dtype.itemsize == 1 else x for x in rows]


@jax.jit
def _text_kv(dit: DiT, text: jax.Array) -> TextKV:
    return dit.text_kv(text[:, None])


def load(
    name: str | os.PathLike = "tiny",
    *,
    dtype=None,
    sharding: Sharding | None = None,
    vae: str = "full",
    lora: Choice = None,
    weights_only: bool = False,
) -> Model:
    """The model that ships with the package ("tiny"), or one in a folder: config.json, weights,
    tokenizer. Parameters go from the files to their devices one at a time.

    dtype: of the weights; None is float32 on a CPU and bfloat16 on an accelerator. sharding: where
    a parameter goes, of its part ("dit", "text", "vae"), path and shape; None is the default
    device. vae: "full", or the name of a faster decoder that the folder has ("light", "tae"). lora:
    a LoRA file that is applied unmerged, in place of the folder's own `lora.safetensors`; or
    several, each a path or a pair of a path and a strength, whose changes are added up.
    weights_only: what is multiplied with matrices in fewer bits stays as it is. Warns where a GPU
    only emulates what such a model says.

    Raises:
      InputError: there is no such model, or a part of it is missing or broken.
    """
    folder, files = folder_of(name), listed(lora)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    cfg = _products(folder, read_config(folder), weights_only)
    _check(folder, cfg, dtype)
    decoder = _decoder(folder, cfg, vae)
    build = {
        "dit": lambda: _transformer(cfg),
        "text": lambda: UMT5(cfg.text, rngs=nnx.Rngs(0)),
        "vae": lambda: vaes.build(decoder, rngs=nnx.Rngs(0)),
    }
    stored = {"dit": "dit", "text": "text", "vae": "vae" if vae == "full" else f"vae_{vae}"}
    _check_parts(folder, stored)
    parts = {}
    try:
        words = tokenizer.load(folder, cfg.dit.text_len)
        for part, file in stored.items():
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
    chosen = (LoraFile(str(own)),) if files is None and own.is_file() else files or ()
    dit, notes = _adapted(parts["dit"], chosen)
    text = TextEncoder(parts["text"], words, cfg.dit.text_len)
    origin = Origin(str(name), vae, files, weights_only)
    return Model(cfg, dit, parts["vae"], text, origin, notes)


def _adapted(dit: DiT, files: Sequence[LoraFile]) -> tuple[DiT, tuple[str, ...]]:
    """The transformer with these LoRAs alone, and what of them is left out."""
    dit = loras.bare(dit)
    shapes = {path: leaf.shape for path, leaf in weights.flatten(dit).items()}
    lora = loras.read_all(files, shapes)
    if lora is None:
        return dit, ()
    dtype = dit.head.kernel[...].dtype
    a, b = ({path: jnp.array(x, dtype) for path, x in side.items()} for side in (lora.a, lora.b))
    return loras.apply(dit, dataclasses.replace(lora, a=a, b=b)), lora.notes


def _check(folder: pathlib.Path, cfg: ModelConfig, dtype: Any) -> None:
    """Raises InputError where a model of that config, which computes in `dtype`, makes no video."""
    try:
        config.check_whole(cfg)
        sampler.make(cfg.sampler)
        if cfg.stream.attention != "best":
            rollout.check_attention(cfg, dtype)
    except (ValueError, NotImplementedError) as error:
        raise InputError(f'"{folder / "config.json"}" is no model\'s config: {error}') from error


def _transformer(cfg: ModelConfig) -> DiT:
    dit = DiT(cfg.dit, rngs=nnx.Rngs(0))
    if cfg.precision is None:
        return dit
    from longlive_jax.quant import transformer

    return transformer.quantize(dit, cfg.precision)


def _products(folder: pathlib.Path, cfg: ModelConfig, weights_only: bool) -> ModelConfig:
    """The config, with products of a kernel in fewer bits as they are asked for."""
    from longlive_jax.quant import transformer

    if weights_only and cfg.precision is None:
        raise InputError(
            "--weights_only says how --precision is meant: name that too, as the matrices of"
            f' "{folder}" are in no fewer bits'
        )
    if weights_only:
        precision = dataclasses.replace(cfg.precision, weights_only=True)
        cfg = dataclasses.replace(cfg, precision=precision)
    if cfg.precision is not None:
        transformer.tell(cfg.precision)
    return cfg


def read_config(folder: pathlib.Path) -> ModelConfig:
    """Of a model in a folder. Raises InputError where there is none."""
    path = folder / "config.json"
    try:
        data = documents.read(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = f'"{folder}" is no model: config.json is missing'
        raise InputError(published.advice(folder) or missing) from error
    # The config.json of Wan and of diffusers is about one part.
    foreign = not isinstance(data, dict) or "dit" not in data
    if foreign and (advice := published.advice(folder)):
        raise InputError(advice)
    if not isinstance(data, dict):
        raise InputError(f'"{path}" is no model\'s config: it is no group of fields')
    try:
        return config.from_json(data)
    except InputError as error:
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


# A transformer's files; and the folder's own LoRA, which is of that transformer.
_OF_TRANSFORMER = ("dit.", "dit-", "lora.")


def write_with(
    target: pathlib.Path,
    source: pathlib.Path,
    transformer: Mapping[str, Pending],
    cfg: ModelConfig | None = None,
) -> None:
    """Writes the folder `target`, whole or not at all: the model in `source` with another
    transformer, and with another config if one is given. Other weights are linked where the disk
    allows it; the rest, and what people edit, is copied.

    Raises:
      InputError: it cannot be written.
    """
    with weights.new_folder(target) as folder:
        weights.write(folder, "dit", transformer)
        for file in sorted(source.iterdir()):
            if file.is_file() and not file.name.startswith(_OF_TRANSFORMER):
                _take(file, folder / file.name)
        if cfg is not None:
            text = json.dumps(config.to_json(cfg), indent=1) + "\n"
            (folder / "config.json").write_text(text, "utf-8")


def _take(file: pathlib.Path, target: pathlib.Path) -> None:
    if file.suffix != ".safetensors":
        shutil.copyfile(file, target)
        return
    try:
        os.link(file.resolve(), target)
    except OSError:  # another disk, or one that knows no links
        shutil.copyfile(file, target)
