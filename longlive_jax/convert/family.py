"""What a path holds: which parts of which model, under whose names.

    Wan         config.json, diffusion_pytorch_model*.safetensors, Wan2.x_VAE.pth,
                models_t5_*.pth, google/umt5-xxl/
    diffusers   model_index.json, transformer/, vae/, text_encoder/, tokenizer/; or one of these
    LongLive    a dict of dicts: generator, generator_ema, model; weights as they are or packed
    ours        config.json, dit*.safetensors, text*, vae*, lora.safetensors, the tokenizer
    files       a LoRA, LightVAE, TAEHV, or any part of the above

Nothing goes by a file's name that its tensors can tell.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from longlive_jax import config, documents, weights
from longlive_jax.config import (
    DiTConfig,
    ModelConfig,
    Precision,
    TAEConfig,
    TextConfig,
    VAEConfig,
)
from longlive_jax.convert import light, nvfp4, tae, umt5, wan_dit, wan_vae
from longlive_jax.convert.source import ENGINE, Checkpoint, Tensors, open_checkpoint
from longlive_jax.convert.table import Row
from longlive_jax.errors import InputError

PartConfig = DiTConfig | VAEConfig | TAEConfig | TextConfig
PARTS = ("dit", "text", "vae", "vae_light", "vae_tae")  # as their files are called
TOKENIZER = ("tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")
# In an export: LongLive's name; and apart from the shards that folders are searched for.
LORAS = {"pytorch": "lora.pt", "diffusers": "lora/lora.safetensors"}
_DECODERS = ("lightvae.pth", "taew2_?.pth", "taew2_?.safetensors", "vae_light/*.safetensors")
_STAGES = ("high_noise_model", "low_noise_model")  # Wan2.2-A14B
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_GROUPS = ("generator", "generator_lora", "model", "gen_model", "state_dict", "")
_FOLDERS = {"transformer": "dit", "vae": "vae", "text_encoder": "text", "tokenizer": "tokenizer"}
_REFUSED = {"longlive_generator_te_nvfp4": ENGINE}


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a model. `tensors` go by the names of `layout`, wrappers taken off.

    hints: what a `config.json` beside it says that shapes do not. path: where it was found. plain:
    the file's names are bare, which those of LongLive's generators are not. packed: `tensors` as
    `nvfp4.kept` has them, of a file that is packed. precision: of ours, what its matrices are in.
    """

    name: str
    layout: str  # "wan", "diffusers", "transformers" or "ours"
    tensors: Tensors
    hints: Mapping[str, Any]
    path: pathlib.Path
    plain: bool = False
    packed: Tensors | None = None
    precision: Precision | None = None

    def config(self) -> PartConfig:
        """Its shape. Raises InputError where names are missing that every such model has, and for
        kinds that are not supported.
        """

        def shape(name: str) -> tuple[int, ...]:
            return tuple(self.tensors.spec(name).shape)

        infer = _INFER[self.name]
        try:
            return infer(self.tensors, shape, self.layout, self.hints)
        except KeyError as error:
            raise InputError(f"{self.path}: {error.args[0]} is missing") from error
        except NotImplementedError as error:
            raise InputError(f"{self.path} {error}, which is not supported") from error
        except ValueError as error:
            raise InputError(f"{self.path} has tensors of unknown shape: {error}") from error

    def rows(self, cfg: PartConfig) -> Sequence[Row]:
        """The name table that fills a module of this config."""
        return rows(self.name, self.layout, cfg)


@dataclasses.dataclass(frozen=True)
class Source:
    """What one path holds. config: of a model of ours. tokenizer: its folder."""

    parts: tuple[Part, ...]
    tokenizer: pathlib.Path | None = None
    lora: pathlib.Path | None = None
    config: ModelConfig | None = None


def _infer_tae(found, shape, layout, hints) -> TAEConfig:
    del shape, layout, hints
    return tae.config(found)


_INFER: dict[str, Callable[..., PartConfig]] = {
    "dit": wan_dit.infer,
    "text": umt5.infer,
    "vae": wan_vae.infer,
    "vae_light": wan_vae.infer,
    "vae_tae": _infer_tae,
}
_ROWS: dict[tuple[str, str], Callable[[Any], Sequence[Row]]] = {
    ("dit", "wan"): wan_dit.rows,
    ("dit", "diffusers"): wan_dit.rows_diffusers,
    ("text", "wan"): lambda _: umt5.rows(),
    ("text", "transformers"): lambda _: umt5.rows_transformers(),
    ("vae", "wan"): wan_vae.rows,
    ("vae", "diffusers"): wan_vae.rows_diffusers,
    ("vae_tae", "wan"): tae.rows,
}


def rows(part: str, layout: str, cfg: PartConfig) -> Sequence[Row]:
    """The name table of a part in a layout."""
    return _ROWS["vae" if part == "vae_light" else part, layout](cfg)


def identity(names: Collection[str]) -> list[Row]:
    """The table of our own files."""
    return [Row(name, name) for name in names]


def read(path: pathlib.Path, *, ema: bool = False) -> Source:
    """Recognises what is at `path`. ema: takes `generator_ema` where there is a choice.

    Raises:
      InputError: nothing is there, or nothing that is known, or a promised part is missing.
    """
    if not path.exists():
        raise InputError(f"there is nothing at {path}")
    if path.is_file():
        return _file(path, ema)
    if any((path / name).is_dir() for name in _STAGES):
        raise InputError(f"{path} has two transformers, which is not supported")
    if (path / "model_index.json").is_file():
        return _and_beside(path, _diffusers(path))
    said = _json(path / "config.json")
    if "dit" in said and "stream" in said:
        return _ours(path, said)
    if any((path / name).is_dir() for name in _FOLDERS):
        return _gather(path / name for name in _FOLDERS if (path / name).is_dir())
    return _and_beside(path, _folder(path, said))


def _and_beside(path: pathlib.Path, source: Source) -> Source:
    """With the decoders and the LoRA that an export of ours has beside the model."""
    files = sorted(file for pattern in _DECODERS for file in path.glob(pattern))
    parts = [part for file in files for part in _file(file, False).parts]
    loras = (path / name for name in LORAS.values() if (path / name).is_file())
    lora = next(loras, source.lora)
    return dataclasses.replace(source, parts=(*source.parts, *parts), lora=lora)


def _file(path: pathlib.Path, ema: bool, hints: Mapping[str, Any] | None = None) -> Source:
    checkpoint = open_checkpoint(path)
    said = checkpoint.facts.get("checkpoint_format")
    if said in _REFUSED:
        raise InputError(f"{path} {_REFUSED[said]}")
    wrapped = _group(path, checkpoint, ema)
    tensors = _unwrap(path, wrapped)
    if any("lora" in name for name in tensors):
        if other := [n for n in tensors if "lora" not in n and not n.endswith(".alpha")]:
            raise InputError(f"{path} mixes a LoRA with other tensors: {_listed(other)}")
        return Source((), lora=path)
    plain = tensors.keys() == wrapped.keys()
    packed = None
    if nvfp4.is_packed(tensors):
        packed, tensors = nvfp4.kept(tensors), nvfp4.unpacked(tensors)
    part = _part(path, tensors, hints or {}, bare=hints is None)
    return Source((dataclasses.replace(part, plain=plain, packed=packed),))


def _group(path: pathlib.Path, checkpoint: Checkpoint, ema: bool) -> Tensors:
    groups = checkpoint.groups
    if ema and "generator" in groups and "generator_ema" not in groups:
        raise InputError(f"{path} has no generator_ema: it has {_listed(groups)}")
    for name in ("generator_ema", *_GROUPS) if ema else _GROUPS:
        if name in groups and len(groups[name]):
            return groups[name]
    if "generator_ema" in groups:
        raise InputError(f"{path} holds a generator_ema only: say --ema")
    raise InputError(f"{path} has no model in it: it has {_listed(groups) or 'nothing'}")


def _unwrap(path: pathlib.Path, tensors: Tensors) -> Tensors:
    """The tensors without the names of what a training wraps around modules, the heads that only
    a LightVAE's training used, and the second name that transformers gives to the embedding.
    """
    names: dict[str, list[str]] = {}
    for new, old in light.unwrap(tensors).items():
        for wrapper in _WRAPPERS:
            new = new.replace(wrapper, "")
        names.setdefault(new, []).append(old)
    if all(name.startswith("model.") for name in names):
        names = {name.removeprefix("model."): olds for name, olds in names.items()}
    if twice := [olds for olds in names.values() if len(olds) > 1]:
        raise InputError(f"{path} has one tensor under two names: {' and '.join(twice[0])}")
    return _renamed(tensors, {new: olds[0] for new, olds in names.items()})


def _renamed(tensors: Tensors, names: dict[str, str]) -> Tensors:
    if (tied := "encoder.embed_tokens.weight") in names:
        names.setdefault("shared.weight", names[tied])
        del names[tied]
    return tensors.renamed(names)


# Name that only this part in this layout has.
_SIGNS = {
    "text_embedding.0.weight": ("dit", "wan"),
    "condition_embedder.text_embedder.linear_1.weight": ("dit", "diffusers"),
    "decoder.head.0.gamma": ("vae", "wan"),
    "decoder.norm_out.gamma": ("vae", "diffusers"),
    "token_embedding.weight": ("text", "wan"),
    "shared.weight": ("text", "transformers"),
}


def _part(path: pathlib.Path, tensors: Tensors, hints: Mapping[str, Any], *, bare: bool) -> Part:
    """bare: the file came alone, so that a VAE of other widths than Wan's is the light one."""
    found = [kind for sign, kind in _SIGNS.items() if sign in tensors]
    if tae.matches(tensors):
        found.append(("vae_tae", "wan"))
    if len(found) > 1:
        parts = " and ".join(sorted({name for name, _ in found}))
        raise InputError(f"{path} mixes tensors of several models: {parts}")
    if not found:
        raise InputError(f"{path} is no model that is known: it has {_listed(tensors)}")
    part = Part(*found[0], tensors, hints, path)
    if part.name == "vae" and bare and _is_light(part.config()):
        return dataclasses.replace(part, name="vae_light")
    return part


def _is_light(cfg: VAEConfig) -> bool:
    full = config.WAN22_VAE
    return cfg.shortcut and (cfg.encoder_dim, cfg.decoder_dim) != (
        full.encoder_dim,
        full.decoder_dim,
    )


def _told_apart(parts: Sequence[Part]) -> list[Part]:
    """The parts of one folder. Its light VAE is the one that a wider one of the kind lies beside;
    or a pruned one whose .pth file is in diffusers' words, as only LightVAE's are.
    """
    vaes = {i: part.config() for i, part in enumerate(parts) if part.name == "vae"}
    widest = max((cfg.decoder_dim for cfg in vaes.values() if cfg.shortcut), default=0)
    told = list(parts)
    for i, cfg in vaes.items():
        training = (parts[i].path.suffix, parts[i].layout) == (".pth", "diffusers")
        if _is_light(cfg) and (training or cfg.decoder_dim < widest):
            told[i] = dataclasses.replace(parts[i], name="vae_light")
    return told


def _diffusers(path: pathlib.Path) -> Source:
    index = _json(path / "model_index.json")
    promised = [name for name in _FOLDERS if (index.get(name) or [None])[0]]
    if absent := [name for name in promised if not (path / name).is_dir()]:
        raise InputError(f"{path}: model_index.json promises {_listed(absent)}, which is missing")
    if (index.get("transformer_2") or [None])[0]:
        raise InputError(f"{path} has two transformers, which is not supported")
    return _gather(path / name for name in promised)


def _gather(folders) -> Source:
    """Component folders of diffusers. Each must hold what its name says."""
    parts, tokenizer = [], None
    for folder in folders:
        found = _folder(folder, _json(folder / "config.json"))
        kinds = {part.name for part in found.parts} | ({"tokenizer"} if found.tokenizer else set())
        if _FOLDERS[folder.name] not in kinds:
            raise InputError(f"{folder} holds no {folder.name}")
        parts += found.parts
        tokenizer = found.tokenizer or tokenizer
    return Source(tuple(parts), tokenizer)


def _folder(path: pathlib.Path, hints: Mapping[str, Any]) -> Source:
    """Wan's folder, or one component's: shards in safetensors, parts in .pth files, a tokenizer."""
    parts, lora = [], None
    if any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        found = _file(path, False, hints)
        parts += found.parts
        lora = found.lora
    for file in sorted([*path.glob("*VAE*.pth"), *path.glob("models_t5*.pth")]):
        parts += _file(file, False, {}).parts
    parts = _told_apart(parts)
    if twice := [name for name in PARTS if sum(part.name == name for part in parts) > 1]:
        raise InputError(f"{path} holds more than one {_listed(twice)}")
    places = (path, path / "google" / "umt5-xxl", path / "tokenizer")
    tokenizer = next((place for place in places if _has_tokenizer(place)), None)
    if not (parts or tokenizer or lora):
        files = [file.name for kind in ("*.pt", "*.pth") for file in path.glob(kind)]
        hint = f"; name one of its files with --from: {_listed(files)}" if files else ""
        raise InputError(f"{path} holds nothing that is known{hint}")
    return Source(tuple(parts), tokenizer, lora)


def _ours(path: pathlib.Path, said: Mapping[str, Any]) -> Source:
    try:
        cfg = config.from_json(dict(said))
    except InputError as error:
        raise InputError(f"{path / 'config.json'} cannot be read: {error}") from error
    held = [name for name in PARTS if weights.exists(path, name)]
    precision = {"dit": cfg.precision}
    parts = (
        Part(name, "ours", weights.read(path, name), {}, path, precision=precision.get(name))
        for name in held
    )
    lora = path / "lora.safetensors"
    return Source(
        tuple(parts),
        path if _has_tokenizer(path) else None,
        lora if lora.is_file() else None,
        cfg,
    )


def _has_tokenizer(folder: pathlib.Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER[:2])


def _json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        said = documents.read(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(said, dict):
        raise InputError(f"{path} is no config")
    return said


def _listed(names: Collection[str]) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
