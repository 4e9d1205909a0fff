"""`longlive convert`: checkpoints in, one folder out, and nothing written before all is checked."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax import config, lora, output, weights
from longlive_jax.config import ModelConfig, Precision
from longlive_jax.convert import export, family, nvfp4, table
from longlive_jax.convert.family import Part, PartConfig, Source
from longlive_jax.convert.source import Tensors
from longlive_jax.convert.table import NameMismatch, Pending, Row
from longlive_jax.dit.model import DiT
from longlive_jax.errors import InputError
from longlive_jax.flow import TRAIN_STEPS
from longlive_jax.lora_files import LoraFile
from longlive_jax.quant import files, transformer
from longlive_jax.text.umt5 import UMT5
from longlive_jax.vae import build as vaes

DTYPES = {"keep": None, "bfloat16": jnp.bfloat16, "float32": jnp.float32}
FORMATS = ("longlive", *export.FORMATS)
PRESETS = (config.WAN21_T2V_1_3B, config.WAN21_T2V_14B, config.WAN22_TI2V_5B)
_DECODERS = {"vae_light": "light", "vae_tae": "tae"}
_PLAIN = (
    "{path} is a Wan transformer without LongLive's generator or LoRA: made in {steps} steps, chunk"
    " by chunk, its videos make no sense; add one with --from, or tune it"
)
_KEPT = "the packed matrices of {path} stay in NVFP4, to the byte; --dequantize unpacks them"
# What shapes do not tell: taken over from a source that knows it.
_UNSEEN = (
    *("heads", "text_len", "eps", "rope_theta", "rope_period"),
    *("mean", "std", "max_distance"),
)


def convert(
    paths: Sequence[pathlib.Path],
    to: pathlib.Path,
    *,
    layout: str = "longlive",
    allow_missing: bool = False,
    dtype: str = "keep",
    ema: bool = False,
    steps: int | None = None,
    dequantize: bool = False,
) -> tuple[str, ...]:
    """Makes one model of all that `paths` hold and writes it to the new folder `to`. Where several
    hold the same part, the last one's counts.

    layout: "longlive", "pytorch" (the original code's) or "diffusers". allow_missing: parameters
    that a checkpoint lacks are zero, and listed in the config. dtype: "keep", "bfloat16",
    "float32", of what is not in fewer bits. ema: LongLive's averaged generator. steps: how many the
    transformer was distilled to, if not to the family's number. dequantize: matrices in fewer bits
    become bfloat16, as they do in other layouts than ours.

    Returns: sentences that whoever asked should read.

    Raises:
      InputError: something is not as it should be; nothing has been written then.
    """
    output.check_new_folder(to)
    sources = [family.read(path, ema=ema, dtype=DTYPES[dtype]) for path in paths]
    parts, configs = combine(sources)
    if not parts:
        raise InputError("there is no model in what was given, only what goes with one")
    cfg = _stepped(assemble(sources, configs), steps, layout)
    dense = dequantize or layout != "longlive"
    plan = functools.partial(_plan, allow_missing=allow_missing, dense=dense)
    planned = {name: plan(part, configs[name]) for name, part in parts.items()}
    missing = [f"{name}: {source}" for name in planned for source in planned[name].missing]
    precision = planned["dit"].precision if "dit" in planned else None
    cfg = dataclasses.replace(
        cfg, allowed_missing=(*cfg.allowed_missing, *missing), precision=precision
    )
    adapter = _lora(sources, abstract("dit", configs["dit"]) if "dit" in parts else None)
    tokenizer = next((s.tokenizer for s in reversed(sources) if s.tokenizer), None)
    with weights.new_folder(to) as stage:
        ours = stage if layout == "longlive" else stage / "model"
        for name in parts:
            weights.write(ours, name, planned[name].typed(DTYPES[dtype]))
        _write_rest(ours, cfg, adapter, tokenizer)
        if layout != "longlive":
            export.write(ours, stage, layout)
            shutil.rmtree(ours)
    dit = parts.get("dit")
    notes = tuple(note for source in sources for note in source.notes)
    notes += tuple(part.note for part in parts.values() if part.note)
    notes += () if adapter is None else adapter.notes
    if layout == "longlive" and dit is not None and dit.plain and adapter is None:
        notes += (_PLAIN.format(path=dit.path, steps=cfg.sampler.steps),)
    if precision is not None and dit.packed is not None:
        notes += (_KEPT.format(path=dit.path),)
    return notes


def _stepped(cfg: ModelConfig, steps: int | None, layout: str) -> ModelConfig:
    """The config with another number of steps, evenly spaced."""
    if steps is None:
        return cfg
    if layout != "longlive":
        raise InputError(f"the {layout} format has no place for --steps")
    if not 1 <= steps <= TRAIN_STEPS:
        raise InputError(f"--steps must be from 1 to {TRAIN_STEPS}, not {steps}")
    sampler = dataclasses.replace(cfg.sampler, steps=steps, timesteps=())
    return dataclasses.replace(cfg, sampler=sampler)


def combine(sources: Sequence[Source]) -> tuple[dict[str, Part], dict[str, PartConfig]]:
    """The parts of all sources, the last of each kind, and their shapes.

    Raises:
      InputError: they are not of one model.
    """
    parts: dict[str, Part] = {}
    configs: dict[str, PartConfig] = {}
    for source in sources:
        for part in source.parts:
            cfg = _own(part, source.config) if source.config else part.config()
            if part.name in parts and part.name not in _DECODERS:
                before = configs[part.name]
                seen = {name: getattr(before, name) for name in _UNSEEN if hasattr(before, name)}
                if dataclasses.replace(cfg, **seen) != before:
                    raise _mixed(parts[part.name], part, "are of different shapes")
                cfg = cfg if part.hints or source.config else before
            parts[part.name], configs[part.name] = part, cfg
    _agree(parts, {name: _latents(cfg) for name, cfg in configs.items()}, "latent channels")
    widths = {"dit": "text_dim", "text": "dim"}
    _agree(parts, {n: getattr(configs[n], w) for n, w in widths.items() if n in parts}, "text")
    if "vae" in configs and "vae_light" in configs:
        full = configs["vae"]
        configs["vae_light"] = dataclasses.replace(
            configs["vae_light"], mean=full.mean, std=full.std
        )
    return parts, configs


def _own(part: Part, cfg: ModelConfig) -> PartConfig:
    if part.name in _DECODERS:
        return cfg.decoder(_DECODERS[part.name])
    return getattr(cfg, part.name)


def _latents(cfg: PartConfig) -> int | None:
    return getattr(cfg, "channels", None) or getattr(cfg, "latent_channels", None)


def _agree(parts: Mapping[str, Part], counts: Mapping[str, int | None], what: str) -> None:
    counts = {name: count for name, count in counts.items() if count is not None}
    if len(set(counts.values())) > 1:
        first, *others = counts
        other = next(name for name in others if counts[name] != counts[first])
        numbers = f"have {counts[first]} and {counts[other]} {what}"
        raise _mixed(parts[first], parts[other], numbers.replace(" text", " columns of text"))


def _mixed(first: Part, second: Part, why: str) -> InputError:
    return InputError(f"two families are mixed: {first.path} and {second.path} {why}")


def assemble(sources: Sequence[Source], configs: Mapping[str, PartConfig]) -> ModelConfig:
    """The config of a model with these parts; of a part that is not there, the family's."""
    own = [s.config for s in sources if s.config and {p.name for p in s.parts} & {"dit", "vae"}]
    base = own[-1] if own else _preset(configs)
    dit, vae, text = (configs.get(name, getattr(base, name)) for name in ("dit", "vae", "text"))
    latents = next((n for n in map(_latents, configs.values()) if n), base.dit.channels)
    if "dit" not in configs:
        dit = dataclasses.replace(dit, channels=latents, text_dim=text.dim)
    elif "text" not in configs:
        text = dataclasses.replace(text, dim=dit.text_dim)
    if vae.latent_channels != latents:
        vae = dataclasses.replace(vae, latent_channels=latents, mean=(), std=())
    decoders = dict(base.decoders)
    decoders |= {_DECODERS[name]: configs[name] for name in _DECODERS if name in configs}
    known = own or dit == base.dit
    return dataclasses.replace(
        base,
        name=base.name if known else base.name.split("_")[0],
        dit=dit,
        vae=vae,
        text=text,
        decoders=tuple(decoders.items()),
    )


def _preset(configs: Mapping[str, PartConfig]) -> ModelConfig:
    """The published model that this is, or the smallest of its family: Wan2.2 has 48 latent
    channels, or a VAE with shortcuts.
    """
    for preset in PRESETS:
        if preset.dit == configs.get("dit"):
            return preset
    wide = any(_latents(cfg) == 48 for cfg in configs.values())
    shortcut = any(getattr(cfg, "shortcut", False) for cfg in configs.values())
    return config.WAN22_TI2V_5B if wide or shortcut else config.WAN21_T2V_1_3B


def abstract(name: str, cfg: PartConfig, how: Precision | None = None) -> nnx.Module:
    """The module of a part, of shapes only. how: what matrices of a transformer are kept in."""
    kind: Any = {"dit": DiT, "text": UMT5}.get(name, vaes.build)

    def build():
        made = kind(cfg, rngs=nnx.Rngs(0))
        return made if how is None else transformer.quantize(made, how)

    return nnx.eval_shape(build)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to make each parameter of a part. missing: names that are allowed to be. precision: of
    what is in fewer bits. fixed: the parameters that this is made of, whose types stay.
    """

    pending: dict[str, Pending]
    missing: Sequence[str] = ()
    precision: Precision | None = None
    fixed: Collection[str] = ()

    def typed(self, dtype: Any) -> dict[str, Pending]:
        """The parameters, of which real ones that are not fixed are of that type; None keeps it."""

        def cast(name: str, entry: Pending) -> Pending:
            stays = dtype is None or name in self.fixed
            if stays or not jnp.issubdtype(entry.dtype, jnp.floating):
                return entry
            return dataclasses.replace(entry, dtype=np.dtype(dtype))

        return {name: cast(name, entry) for name, entry in self.pending.items()}


def _plan(part: Part, cfg: PartConfig, allow_missing: bool, dense: bool) -> Plan:
    """dense: what is in fewer bits is unpacked."""
    tensors, how = part.tensors, part.precision
    rows = None if part.layout == "ours" else part.rows(cfg)
    if part.packed is not None and not dense:
        tensors = part.packed
        how, rows = nvfp4.table(tensors, rows, cfg.layers)
    leaves = weights.flatten(abstract(part.name, cfg, how))
    held = weights.arrays(leaves)
    rows = family.identity(held) if rows is None else rows
    pending, missing = _filling(part.path, held, rows, tensors, allow_missing)
    if how is None:
        return Plan(pending, missing)
    if dense:
        return Plan(files.dense(pending, leaves), missing)
    return Plan(pending, missing, how, held.keys() - leaves.keys())


def _filling(
    path: pathlib.Path,
    held: Mapping[str, Any],
    rows: Sequence[Row],
    tensors: Tensors,
    allow_missing: bool,
) -> tuple[dict[str, Pending], Sequence[str]]:
    """How to make each of the arrays, and the names that are allowed to be missing."""
    try:
        return table.plan(held, rows, tensors), ()
    except NameMismatch as error:
        only_missing = not (error.unexpected or error.shapes or error.unfilled)
        if allow_missing and only_missing:
            allowed = error.missing
            return table.plan(held, rows, tensors, allow_missing=allowed), allowed
        hint = "; --allow-missing makes them zero" if only_missing else ""
        raise InputError(f"{path} does not fit: {error}{hint}") from error


def _lora(sources: Sequence[Source], dit: DiT | None) -> lora.Lora | None:
    path = None
    for source in sources:  # a transformer that comes later comes without the LoRA of the last one
        if source.lora or any(part.name == "dit" for part in source.parts):
            path = source.lora
    if path is None:
        return None
    if dit is None:
        return lora.read(path)
    shapes = {name: leaf.shape for name, leaf in weights.flatten(dit).items()}
    return lora.read_all((LoraFile(str(path)),), shapes)


def _write_rest(
    folder: pathlib.Path,
    cfg: ModelConfig,
    adapter: lora.Lora | None,
    tokenizer: pathlib.Path | bytes | None,
) -> None:
    text = json.dumps(config.to_json(cfg), indent=1) + "\n"
    (folder / "config.json").write_text(text, "utf-8")
    if adapter is not None:
        lora.save(folder / "lora.safetensors", adapter)
    if isinstance(tokenizer, bytes):
        (folder / "spiece.model").write_bytes(tokenizer)
    elif tokenizer is not None:
        for name in family.TOKENIZER:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
