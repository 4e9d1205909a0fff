"""Wan models of a few thousand random weights, written as the original code writes them."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
from safetensors.numpy import save_file

from longlive_jax import config, weights
from longlive_jax.config import SHIPPED
from longlive_jax.convert import export, family, run, table

DIT = config.DiTConfig(
    dim=64,
    ffn_dim=128,
    heads=2,
    layers=2,
    channels=16,
    text_dim=32,
    text_len=14,
    freq_dim=32,
)
VAE21 = dataclasses.replace(config.WAN21_VAE, encoder_dim=4, decoder_dim=4)
VAE22 = dataclasses.replace(
    config.WAN22_VAE, encoder_dim=4, decoder_dim=8, latent_channels=8, mean=(), std=()
)
TEXT = config.TextConfig(vocab=128, dim=32, attn_dim=32, ffn_dim=64, heads=4, layers=2)
PARTS = {"dit": DIT, "vae": VAE21, "text": TEXT}


def tensors(name: str, layout: str = "wan", *, cfg=None, seed: int = 0) -> dict[str, np.ndarray]:
    """A part's tensors under a layout's names. The seed tells parts of one shape apart."""
    cfg, random = cfg or PARTS[name], np.random.default_rng(seed)
    shapes = weights.flatten(run.abstract(name, cfg))
    flat = {k: random.normal(0, 0.1, v.shape).astype(np.float32) for k, v in shapes.items()}
    pending = table.export_pending(flat, family.rows(name, layout, cfg))
    return {k: np.ascontiguousarray(entry.array()) for k, entry in pending.items()}


def write(folder: pathlib.Path) -> pathlib.Path:
    """Wan's folder, without the `.pth` files."""
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    save_file(tensors("dit"), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(export.wan_config(DIT)))
    shutil.copy(SHIPPED / "tiny" / "tokenizer.json", folder / "google" / "umt5-xxl")
    return folder


def same(got, want) -> bool:
    """The same names, bit by bit the same numbers."""
    return set(got) == set(want) and all(
        np.array_equal(np.asarray(got[name]), x) and got[name].dtype == x.dtype
        for name, x in want.items()
    )
