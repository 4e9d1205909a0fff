"""What a path holds: which parts of which model, under whose names.

    Wan         config.json, diffusion_pytorch_model*.safetensors, Wan2.x_VAE.pth,
                models_t5_*.pth, google/umt5-xxl/
    diffusers   model_index.json, transformer/, vae/, text_encoder/, tokenizer/; or one of these
    LongLive    a dict of dicts: generator, generator_ema, model; weights as they are or packed
    ours        config.json, dit*.safetensors, text*, vae*, lora.safetensors, the tokenizer
    files       a LoRA, LightVAE, TAEHV, or any part of the above; all parts in one (ComfyUI)

A folder of files is all of them, and so is its folder `models`. Matrices in eight bits beside
scales are read as `scaled` says; a tokenizer may lie in a text encoder's file (`spiece_model`).

Nothing goes by a file's name that its tensors can tell.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from longlive_jax import config, documents, listing, weights
from longlive_jax.config import (
    DiTConfig,
    ModelConfig,
    Precision,
    TAEConfig,
    TextConfig,
    VAEConfig,
)
from longlive_jax.convert import light, lora_names, nvfp4, scaled, tae, umt5, wan_dit, wan_vae
from longlive_jax.convert.source import (
    ENGINE,
    Checkpoint,
    Fact,
    Tensors,
    checkpoints,
    open_checkpoint,
)
from longlive_jax.convert.table import Row
from longlive_jax.errors import InputError
from longlive_jax.text import tokenizer

PartConfig = DiTConfig | VAEConfig | TAEConfig | TextConfig
PARTS = ("dit", "text", "vae", "vae_light", "vae_tae")  # as their files are called
TOKENIZER = ("tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")
# In an export: LongLive's name; and apart from the shards that folders are searched for.
LORAS = {"pytorch": "lora.pt", "diffusers": "lora/lora.safetensors"}
_FIRST = (".safetensors", ".json", ".bin")  # these are opened before those of PyTorch's own kind
_LIGHT = ("vae_light", "vae_tae")
_BESIDE = ("*lightvae*", "*tae*", LORAS["pytorch"])
_PICKLES = ("*vae*", "models_t5*", *_BESIDE)  # of which these belong to a model
_STAGES = ("high_noise_model", "low_noise_model")  # Wan2.2-A14B
# Parts of a name that a training adds: FSDP, activation checkpointing, torch.compile, DataParallel.
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module")
# What all names of a file may begin with: those of ComfyUI, which tell nothing of a training, and
# others.
_COMFY = ("model.diffusion_model.", "diffusion_model.", "first_stage_model.", "vae.")
_COMFY += ("text_encoders.umt5xxl.", "cond_stage_model.", "transformer.", "text_encoder.", "taehv.")
_PREFIXES = (*_COMFY, "model.", "pipe.dit.", "dit.")
# The parts of a file that has all of them.
_SECTIONS = ("model.diffusion_model.", "text_encoders.", "cond_stage_model.")
_SECTIONS += ("first_stage_model.", "vae.", "conditioner.")
_SPIECE = "spiece_model"
_LARGEST_SPIECE = 32 << 20  # bytes; that of UMT5 has 4.5 MB
_GROUPS = ("generator", "generator_lora", "model", "gen_model", "state_dict", "")
_FOLDERS = {"transformer": "dit", "vae": "vae", "text_encoder": "text", "tokenizer": "tokenizer"}
_REFUSED = {"longlive_generator_te_nvfp4": ENGINE}


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a model. `tensors` go by the names of `layout`, wrappers taken off.

    hints: what a `config.json` beside it says that shapes do not. path: where it was found. plain:
    the file's names are bare, which those of LongLive's generators are not. packed: `tensors` as
    `nvfp4.kept` has them, of a file that is packed. precision: of ours, what its matrices are in.
    note: what was done to the tensors ("" is nothing).
    """

    name: str
    layout: str  # "wan", "diffusers", "transformers" or "ours"
    tensors: Tensors
    hints: Mapping[str, Any]
    path: pathlib.Path
    plain: bool = False
    packed: Tensors | None = None
    precision: Precision | None = None
    note: str = ""

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
    """The contents of one path. config: of a model of ours. tokenizer: its folder, or a
    `spiece.model`. notes: what of the path was left out.
    """

    parts: tuple[Part, ...]
    tokenizer: pathlib.Path | bytes | None = None
    lora: pathlib.Path | None = None
    config: ModelConfig | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class How:
    """Options of reading. ema: take `generator_ema`. dtype: of dequantised tensors; None is the
    file's.
    """

    ema: bool = False
    dtype: Any = None


class UnknownError(InputError):
    """A checkpoint is whole, but nothing that belongs to a model of ours."""


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


def read(path: pathlib.Path, *, ema: bool = False, dtype: Any = None) -> Source:
    """Recognise what is at a path.

    Args:
      path: A file or a folder.
      ema: Take `generator_ema` where there is a choice.
      dtype: The type of matrices that are dequantised; None is that of the rest of their file.

    Raises:
      InputError: nothing is there, or nothing that is known, or a promised part is missing.
    """
    how = How(ema, dtype)
    if not path.exists():
        raise InputError(f"there is nothing at {path}")
    if path.is_file():
        return _file(path, how)
    if any((path / name).is_dir() for name in _STAGES):
        raise InputError(f"{path} has two transformers, which is not supported")
    if (path / "model_index.json").is_file():
        return _and_beside(path, _diffusers(path, how), how)
    said = _json(path / "config.json")
    if "dit" in said and "stream" in said:
        return _ours(path, said)
    if any((path / name).is_dir() for name in _FOLDERS):
        folders = [path / name for name in _FOLDERS if (path / name).is_dir()]
        return _and_beside(path, _gather(folders, how), how)
    return _folder(path, said, how)


def _and_beside(path: pathlib.Path, source: Source, how: How) -> Source:
    """Add the decoders and the LoRA that lie beside component folders."""
    beside = _gathered(path, {}, how, only=_BESIDE)
    parts = source.parts + tuple(part for part in beside.parts if part.name in _LIGHT)
    if (light := path / "vae_light").is_dir():
        parts += _gathered(light, None, how).parts
    exported = path / LORAS["diffusers"]
    lora = exported if exported.is_file() else source.lora or beside.lora
    return dataclasses.replace(source, parts=parts, lora=lora)


def _file(
    path: pathlib.Path,
    how: How,
    hints: Mapping[str, Any] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Source:
    """Return the parts of a checkpoint, of which `hints` tells more; None of a file that came
    alone.
    """
    checkpoint = open_checkpoint(path) if checkpoint is None else checkpoint
    said = checkpoint.facts.get("checkpoint_format")
    if said in _REFUSED:
        raise InputError(f"{path} {_REFUSED[said]}")
    wrapped = _group(path, checkpoint, how.ema)
    found = [
        _section(path, tensors, checkpoint.facts, how, hints) for tensors in _sections(wrapped)
    ]
    source = Source(tuple(part for one in found for part in one.parts))
    for one in found:
        source = dataclasses.replace(
            source, lora=one.lora or source.lora, tokenizer=one.tokenizer or source.tokenizer
        )
    return source


def _sections(tensors: Tensors) -> list[Tensors]:
    """Divide a file that holds several parts, by what their names begin with."""
    groups: dict[str, dict[str, str]] = {}
    for name in tensors:
        start = next((start for start in _SECTIONS if name.startswith(start)), "")
        groups.setdefault(start, {})[name] = name
    if len(groups) < 2 or "" in groups:
        return [tensors]
    return [tensors.renamed(names) for names in groups.values()]


def _section(
    path: pathlib.Path,
    wrapped: Tensors,
    facts: Mapping[str, Fact],
    how: How,
    hints: Mapping[str, Any] | None,
) -> Source:
    tensors, plain = _unwrap(path, wrapped)
    if any("lora" in name or lora_names.place(name) for name in tensors):
        if other := [n for n in tensors if "lora" not in n and not lora_names.place(n)]:
            raise InputError(f"{path} mixes a LoRA with other tensors: {_listed(other)}")
        return Source((), lora=path)
    words = None
    if _SPIECE in tensors:
        words = _spiece(path, tensors)
        tensors = tensors.renamed({name: name for name in tensors if name != _SPIECE})
    packed, note = None, ""
    if nvfp4.is_packed(tensors):
        packed, tensors = nvfp4.kept(tensors), nvfp4.unpacked(tensors)
    else:
        dense = scaled.dequantised(tensors, facts, path, how.dtype)
        tensors, note = dense.tensors, dense.note
    part = _part(path, tensors, hints or {}, bare=hints is None)
    part = dataclasses.replace(part, plain=plain, packed=packed, note=note)
    return Source((part,), words)


def _spiece(path: pathlib.Path, tensors: Tensors) -> bytes:
    """The tokenizer inside a text encoder's file."""
    spec = tensors.spec(_SPIECE)
    if spec.dtype.itemsize != 1 or not 0 < math.prod(spec.shape) <= _LARGEST_SPIECE:
        raise InputError(f"{path} is damaged: {_SPIECE} is {spec.dtype} {list(spec.shape)}")
    data = tensors[_SPIECE].tobytes()
    try:
        tokenizer.from_sentencepiece(data, text_len=1)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: the tokenizer in {_SPIECE} cannot be read: {reason}") from error
    return data


def _group(path: pathlib.Path, checkpoint: Checkpoint, ema: bool) -> Tensors:
    groups = checkpoint.groups
    if ema and "generator" in groups and "generator_ema" not in groups:
        raise InputError(f"{path} has no generator_ema: it has {_listed(groups)}")
    for name in ("generator_ema", *_GROUPS) if ema else _GROUPS:
        if name in groups and len(groups[name]):
            return groups[name]
    if "generator_ema" in groups:
        raise InputError(f"{path} holds a generator_ema only: say --ema")
    raise UnknownError(f"{path} has no model in it: it has {_listed(groups) or 'nothing'}")


def _unwrap(path: pathlib.Path, tensors: Tensors) -> tuple[Tensors, bool]:
    """The tensors without the names of what is wrapped around modules, the heads that only a
    LightVAE's training used, and the second name that transformers gives to the embedding; and
    whether no training has wrapped them.
    """
    names: dict[str, list[str]] = {}
    for new, old in light.unwrap(tensors).items():
        parts = [part for part in new.split(".") if part not in _WRAPPERS]
        if parts[-1] in (scaled.MARKER, _SPIECE):  # of the file, whatever is before them
            parts = parts[-1:]
        names.setdefault(".".join(parts), []).append(old)
    plain = sum(map(len, names.values())) == len(tensors)
    plain = plain and all(olds == [new] for new, olds in names.items() if "." in new)
    while start := next((p for p in _PREFIXES if _all_begin(names, p)), None):
        names = {name.removeprefix(start): olds for name, olds in names.items()}
        plain = plain and start in _COMFY
    if twice := [olds for olds in names.values() if len(olds) > 1]:
        raise InputError(f"{path} has one tensor under two names: {' and '.join(twice[0])}")
    return _renamed(tensors, {new: olds[0] for new, olds in names.items()}), plain


def _all_begin(names: Iterable[str], start: str) -> bool:
    of_modules = [name for name in names if name not in (scaled.MARKER, _SPIECE)]
    return bool(of_modules) and all(name.startswith(start) for name in of_modules)


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
        raise UnknownError(f"{path} is no model that is known: it has {_listed(tensors)}")
    part = Part(*found[0], tensors, hints, path)
    if part.name == "vae" and bare and _is_light(part.config(), path):
        return dataclasses.replace(part, name="vae_light")
    return part


def _is_light(cfg: VAEConfig, path: pathlib.Path) -> bool:
    """Return whether a VAE is pruned: of other widths than Wan's. One of Wan2.1's kind must also be
    called so.
    """
    full = config.WAN22_VAE if cfg.shortcut else config.WAN21_VAE
    named = cfg.shortcut or "lightvae" in path.name.lower()
    return named and (cfg.encoder_dim, cfg.decoder_dim) != (full.encoder_dim, full.decoder_dim)


def _told_apart(parts: Sequence[Part]) -> list[Part]:
    """The parts of one folder. Its light VAE is the one that a wider one of the kind lies beside;
    or a pruned one whose .pth file is in diffusers' words, as only LightVAE's are.
    """
    vaes = {i: part.config() for i, part in enumerate(parts) if part.name == "vae"}
    widest = max((cfg.decoder_dim for cfg in vaes.values() if cfg.shortcut), default=0)
    told = list(parts)
    for i, cfg in vaes.items():
        training = (parts[i].path.suffix, parts[i].layout) == (".pth", "diffusers")
        pruned = training or not cfg.shortcut or cfg.decoder_dim < widest
        if pruned and _is_light(cfg, parts[i].path):
            told[i] = dataclasses.replace(parts[i], name="vae_light")
    return told


def _diffusers(path: pathlib.Path, how: How) -> Source:
    index = _json(path / "model_index.json")
    promised = [name for name in _FOLDERS if (index.get(name) or [None])[0]]
    if absent := [name for name in promised if not (path / name).is_dir()]:
        raise InputError(f"{path}: model_index.json promises {_listed(absent)}, which is missing")
    if (index.get("transformer_2") or [None])[0]:
        raise InputError(f"{path} has two transformers, which is not supported")
    return _gather([path / name for name in promised], how)


def _gather(folders: Iterable[pathlib.Path], how: How) -> Source:
    """Component folders of diffusers. Each must hold what its name says."""
    parts, words, notes = [], None, ()
    for folder in folders:
        found = _folder(folder, _json(folder / "config.json"), how)
        kinds = {part.name for part in found.parts} | ({"tokenizer"} if found.tokenizer else set())
        if _FOLDERS[folder.name] not in kinds:
            raise InputError(f"{folder} holds no {folder.name}")
        parts += found.parts
        words = found.tokenizer or words
        notes += found.notes
    return Source(tuple(parts), words, notes=notes)


def _folder(path: pathlib.Path, hints: Mapping[str, Any], how: How) -> Source:
    """Wan's folder, LongLive's, or one component's: files and shards, a tokenizer."""
    found = _gathered(path, hints, how)
    if (models := path / "models").is_dir() and not found.parts:
        inner = _gathered(models, hints, how)
        found = dataclasses.replace(
            inner, tokenizer=found.tokenizer or inner.tokenizer, lora=inner.lora or found.lora
        )
    if not (found.parts or found.tokenizer or found.lora):
        files = [file.name for kind in ("*.pt", "*.pth") for file in listing.shown(path, kind)]
        hint = f"; name one of its files with --from: {_listed(files)}" if files else ""
        raise UnknownError(f"{path} holds nothing that is known{hint}")
    return found


def _gathered(
    path: pathlib.Path,
    hints: Mapping[str, Any] | None,
    how: How,
    only: Sequence[str] = ("*",),
) -> Source:
    """Return the parts that the checkpoints in a folder hold together.

    Args:
      path: The folder.
      hints: What its `config.json` says; None where nothing can.
      how: How files are read.
      only: Patterns of the names of files, in lower case.
    """
    sources: list[Source] = []
    skipped: list[str] = []
    waiting = {file: opened for file, opened in checkpoints(path).items() if _is(file, only)}
    first = [file for file in waiting if file.suffix.lower() in _FIRST]
    for file in (*first, *(file for file in waiting if file not in first)):
        # Beside a transformer in other files, those of PyTorch's own kind are a training's.
        settled = any(
            part.name == "dit" and part.path in first for s in sources for part in s.parts
        )
        if settled and file not in first and not _is(file, _PICKLES):
            continue
        told = {} if file.suffix.lower() == ".pth" and hints is not None else hints
        try:
            sources.append(_file(file, how, told, waiting[file]()))
        except UnknownError:
            skipped.append(file.name)
    parts = _told_apart([part for one in sources for part in one.parts])
    _check_once(path, parts, [one.lora for one in sources if one.lora])
    places = (path, path / "google" / "umt5-xxl", path / "tokenizer")
    inside = next((one.tokenizer for one in sources if one.tokenizer), None)
    note = f"{_listed(skipped)} in {path} holds no part of a model and is left out"
    return Source(
        tuple(parts),
        next((place for place in places if _has_tokenizer(place)), inside),
        next((one.lora for one in sources if one.lora), None),
        notes=(note,) if skipped and parts else (),
    )


def _is(file: pathlib.Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(file.name.lower(), pattern) for pattern in patterns)


def _check_once(path: pathlib.Path, parts: Sequence[Part], loras: Sequence[pathlib.Path]) -> None:
    """Raises InputError where a folder leaves open which file of a kind is meant."""
    for name in PARTS:
        files = sorted({part.path.name for part in parts if part.name == name})
        if sum(part.name == name for part in parts) > 1:
            raise InputError(
                f"name one of {_listed(files)} with --from: {path} holds more than one {name}"
            )
    if len(loras) > 1:
        files = _listed([file.name for file in loras])
        raise InputError(f"{path} holds more than one LoRA; name one with --from: {files}")
    if loras and loras[0].suffix == ".safetensors" and any(part.name == "dit" for part in parts):
        raise InputError(
            f"{path} mixes a LoRA with other tensors: name the files to use with --from, as"
            f" {loras[0].name}"
        )


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
