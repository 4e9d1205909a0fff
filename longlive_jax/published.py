"""Weights as others publish them, where a model of ours is asked for: which command converts them.

Nothing is opened here, and JAX is not imported.
"""

from __future__ import annotations

import pathlib
import shlex

from longlive_jax import listing

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_OURS = ("dit.", "dit-")  # what a converted transformer is called
# Folders of parts: diffusers', LongLive's, Wan2.2's.
_FOLDERS = ("transformer", "text_encoder", "vae", "models", "high_noise_model", "low_noise_model")


def advice(path: pathlib.Path) -> str:
    """Return what to type where `path` holds published weights; "" where it does not."""
    if path.is_file():
        published = path.suffix.lower() in _SUFFIXES
    else:
        published = _holds_weights(path)
    if not published:
        return ""
    name = path.stem if path.is_file() else path.resolve().name
    to = shlex.quote(f"{name or 'model'}-longlive")
    command = f"longlive convert --from {shlex.quote(str(path))} --to {to}"
    return f'"{path}" holds published weights: run {command} once, then say --model {to}'


def _holds_weights(folder: pathlib.Path) -> bool:
    if not folder.is_dir():
        return False
    places = [folder, *(folder / name for name in _FOLDERS if (folder / name).is_dir())]
    files = [path for place in places for path in listing.shown(place)]
    ours = any(path.name.startswith(_OURS) for path in files)
    return not ours and any(path.suffix.lower() in _SUFFIXES for path in files)
