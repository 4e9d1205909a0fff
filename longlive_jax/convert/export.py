"""A model of ours as other code wants it: the original code's files, or a diffusers pipeline."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from longlive_jax import lora, weights
from longlive_jax.config import (
    WAN22_VAE,
    DiTConfig,
    ModelConfig,
    SamplerConfig,
    TextConfig,
    VAEConfig,
)
from longlive_jax.convert import family, table
from longlive_jax.convert.table import Pending
from longlive_jax.errors import InputError

DIFFUSERS_VERSION = "0.35.0"  # of the classes named here; the first with Wan2.2
_METADATA = {"format": "pt"}  # without it transformers refuses a file


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a part goes: its naming there, and how its folder and file are called."""

    naming: str
    file: Callable[[ModelConfig], str]
    describe: Callable[[Any], dict[str, Any]] | None = None  # what `config.json` says


def _taehv(cfg: ModelConfig) -> str:
    return "taew2_2" if cfg.vae.shortcut else "taew2_1"


def _wan_vae(cfg: ModelConfig) -> str:
    return "Wan2.2_VAE.pth" if cfg.vae.shortcut else "Wan2.1_VAE.pth"


def wan_config(cfg: DiTConfig) -> dict[str, Any]:
    """What Wan's `config.json` says (`WanModel.from_pretrained`)."""
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "model_type": "ti2v" if cfg.channels == WAN22_VAE.latent_channels else "t2v",
        "dim": cfg.dim,
        "eps": cfg.eps,
        "ffn_dim": cfg.ffn_dim,
        "freq_dim": cfg.freq_dim,
        "in_dim": cfg.channels,
        "num_heads": cfg.heads,
        "num_layers": cfg.layers,
        "out_dim": cfg.channels,
        "patch_size": list(cfg.patch),
        "text_dim": cfg.text_dim,
        "text_len": cfg.text_len,
    }


def transformer_config(cfg: DiTConfig) -> dict[str, Any]:
    """Arguments of diffusers' `WanTransformer3DModel`."""
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "patch_size": list(cfg.patch),
        "num_attention_heads": cfg.heads,
        "attention_head_dim": cfg.head_dim,
        "in_channels": cfg.channels,
        "out_channels": cfg.channels,
        "text_dim": cfg.text_dim,
        "freq_dim": cfg.freq_dim,
        "ffn_dim": cfg.ffn_dim,
        "num_layers": cfg.layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": cfg.eps,
    }


def vae_config(cfg: VAEConfig) -> dict[str, Any]:
    """Arguments of diffusers' `AutoencoderKLWan`."""
    said = {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": DIFFUSERS_VERSION,
        "base_dim": cfg.encoder_dim,
        "decoder_base_dim": cfg.decoder_dim,
        "z_dim": cfg.latent_channels,
        "dim_mult": list(cfg.multipliers),
        "num_res_blocks": cfg.res_blocks,
        "attn_scales": [],
        "temperal_downsample": [time > 1 for time, _ in cfg.strides],
        "is_residual": cfg.shortcut,
        "in_channels": 3 * cfg.patch**2,
        "out_channels": 3 * cfg.patch**2,
        "patch_size": cfg.patch if cfg.patch > 1 else None,
        "scale_factor_temporal": cfg.time_stride,
        "scale_factor_spatial": cfg.space_stride,
    }
    channels = cfg.latent_channels
    said["latents_mean"] = list(cfg.mean or (0.0,) * channels)
    said["latents_std"] = list(cfg.std or (1.0,) * channels)
    return said


def text_config(cfg: TextConfig) -> dict[str, Any]:
    """Arguments of transformers' `UMT5EncoderModel`."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": cfg.vocab,
        "d_model": cfg.dim,
        "d_kv": cfg.attn_dim // cfg.heads,
        "d_ff": cfg.ffn_dim,
        "num_heads": cfg.heads,
        "num_layers": cfg.layers,
        "relative_attention_num_buckets": cfg.buckets,
        "relative_attention_max_distance": cfg.max_distance,
        "layer_norm_epsilon": cfg.eps,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
    }


def scheduler_config(cfg: SamplerConfig) -> dict[str, Any]:
    """Arguments of diffusers' `UniPCMultistepScheduler`, as Wan's pipelines have them."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": cfg.shift,
    }


FORMATS: dict[str, dict[str, Place]] = {
    "pytorch": {
        "dit": Place("wan", lambda _: "diffusion_pytorch_model", wan_config),
        "vae": Place("wan", _wan_vae),
        "text": Place("wan", lambda _: "models_t5_umt5-xxl-enc-bf16.pth"),
        "vae_light": Place("diffusers", lambda _: "lightvae.pth"),
        "vae_tae": Place("wan", lambda cfg: f"{_taehv(cfg)}.pth"),
    },
    "diffusers": {
        "dit": Place(
            "diffusers", lambda _: "transformer/diffusion_pytorch_model", transformer_config
        ),
        "vae": Place("diffusers", lambda _: "vae/diffusion_pytorch_model", vae_config),
        "text": Place("transformers", lambda _: "text_encoder/model", text_config),
        "vae_light": Place("diffusers", lambda _: "vae_light/diffusion_pytorch_model", vae_config),
        "vae_tae": Place("wan", _taehv),
    },
}
_TOKENIZERS = {"pytorch": "google/umt5-xxl", "diffusers": "tokenizer"}
_COMPONENTS = {
    "transformer": ("dit", ["diffusers", "WanTransformer3DModel"]),
    "vae": ("vae", ["diffusers", "AutoencoderKLWan"]),
    "text_encoder": ("text", ["transformers", "UMT5EncoderModel"]),
}


def write(folder: pathlib.Path, to: pathlib.Path, layout: str) -> None:
    """Writes the model in `folder` to `to`, which exists, in a layout of `FORMATS`.

    Raises:
      InputError: other code has no such model, the disk is full, or PyTorch is needed and missing.
    """
    source = family.read(folder)
    cfg, parts = source.config, {part.name: part for part in source.parts}
    _check(cfg, parts)
    for name, part in parts.items():
        place = FORMATS[layout][name]
        shape = dict(cfg.decoders).get(name.removeprefix("vae_")) or getattr(cfg, name)
        pending = table.export_pending(part.tensors, family.rows(name, place.naming, shape))
        path = to / place.file(cfg)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pth":
            write_torch(path, pending)
        else:
            weights.write(path.parent, path.name, pending, metadata=_METADATA)
        if place.describe is not None:
            _json(path.parent / "config.json", place.describe(shape))
    if source.lora:
        _LORAS[layout](to / family.LORAS[layout], lora.read(source.lora))
    if source.tokenizer:
        _tokenizer(source.tokenizer, to / _TOKENIZERS[layout])
    if layout == "diffusers":
        _index(to, cfg, parts, tokenizer=source.tokenizer is not None)


def _longlive_lora(path: pathlib.Path, adapter: lora.Lora) -> None:
    """A LoRA as LongLive's inference loads it (`inference.py`, `utils/lora_utils.py`)."""
    tensors = lora.export(lora.unscaled(adapter))
    # The container is optional there to sample with, but not to train on.
    write_torch(path, table.unchanged(tensors), group="generator_lora")


_LORAS: dict[str, Callable[[pathlib.Path, lora.Lora], None]] = {
    "pytorch": _longlive_lora,
    "diffusers": lambda path, adapter: lora.save(path, adapter, "diffusers"),
}


def _check(cfg: ModelConfig, parts: Mapping[str, Any]) -> None:
    odd = []
    if "dit" in parts and (cfg.dit.rope_period or cfg.dit.rope_theta != 10000.0):
        odd.append("positions of its own")
    if "vae" in parts and (cfg.vae.kernel != (3, 3) or not cfg.vae.attention):
        odd.append("a VAE of its own")
    if odd:
        what = " and ".join(odd)
        raise InputError(f"{cfg.name} is no Wan model, it has {what}: no other code runs it")


def _index(
    to: pathlib.Path, cfg: ModelConfig, parts: Mapping[str, Any], *, tokenizer: bool
) -> None:
    """What makes a pipeline of the components; those that are not there are null."""
    index: dict[str, Any] = {
        "_class_name": "WanPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "tokenizer": ["transformers", "T5TokenizerFast"] if tokenizer else [None, None],
    }
    for name, (part, kind) in _COMPONENTS.items():
        index[name] = kind if part in parts else [None, None]
    if cfg.dit.channels == WAN22_VAE.latent_channels:
        index["expand_timesteps"] = True
    _json(to / "model_index.json", index)
    (to / "scheduler").mkdir()
    _json(to / "scheduler" / "scheduler_config.json", scheduler_config(cfg.sampler))


def _tokenizer(source: pathlib.Path, to: pathlib.Path) -> None:
    to.mkdir(parents=True)
    for name in family.TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, to / name)


def _json(path: pathlib.Path, said: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(said, indent=2) + "\n", "utf-8")


def write_torch(path: pathlib.Path, pending: Mapping[str, Pending], *, group: str = "") -> None:
    """A state dict as `torch.save` writes it, one tensor in memory at a time: the file is laid out
    first, with room for the numbers, and then filled through a memory map.

    group: the key of the dict around it, if there is one.
    """
    try:
        import mmap

        import torch
    except ImportError as error:
        raise InputError(
            f'{path.name} needs PyTorch to be written: pip install "longlive-jax[torch]"'
        ) from error
    kinds = {np.dtype(ml_dtypes.bfloat16): torch.bfloat16}
    kinds |= {np.dtype(f"float{n}"): getattr(torch, f"float{n}") for n in (16, 32, 64)}
    # Never touched, so these take no memory.
    empty = {name: torch.empty(x.shape, dtype=kinds[x.dtype]) for name, x in pending.items()}
    need = sum(x.nbytes for x in empty.values())
    if shutil.disk_usage(path.parent).free < need:
        raise InputError(f'no space left in "{path.parent}" for {need / 1e9:.1f} GB')
    with torch.serialization.skip_data():
        torch.save({group: empty} if group else empty, path)
    del empty
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        room = torch.load(path, mmap=True, weights_only=True)
    room = room[group] if group else room
    for name, entry in pending.items():
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[entry.dtype.itemsize]
        start, flat = 0, room[name].view(bits).numpy().reshape(-1)
        for piece in entry.pieces():
            flat[start : start + piece.size] = np.ascontiguousarray(piece).view(flat.dtype).ravel()
            start += piece.size
