"""LoRA tensors to ours and back, in every spelling that Wan LoRAs come in.

A name is taken apart into a `Place`: which linear layer of ours, which block, which matrix. Read:
    base_model.model.blocks.0.self_attn.q.lora_A.weight     peft on the official modules, LongLive
    transformer.blocks.0.attn1.to_q.lora_A.weight           diffusers
    diffusion_model.blocks.0.self_attn.q.lora_down.weight   ComfyUI
    lora_unet_blocks_0_self_attn_q.lora_down.weight         musubi-tuner
Written: the first two.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from longlive_jax.config import WAN21_T2V_1_3B
from longlive_jax.convert import wan_dit
from longlive_jax.convert.table import LINEAR
from longlive_jax.errors import InputError

NAMINGS = ("peft", "diffusers")


def _linears() -> dict[str, tuple[str, str]]:
    cfg = WAN21_T2V_1_3B.dit  # names do not depend on it
    pairs = zip(wan_dit.rows(cfg), wan_dit.rows_diffusers(cfg), strict=True)
    return {
        one.target.removesuffix(".kernel"): tuple(r.source.removesuffix(".weight") for r in pair)
        for pair in pairs
        if (one := pair[0]).axes == LINEAR
    }


LINEARS = _linears()  # our path: the module in the official code, and in diffusers
_PREFIX = dict(zip(NAMINGS, ("base_model.model.", "transformer."), strict=True))
_SIDES = {"a": "lora_A", "b": "lora_B"}


def _plain(module: str) -> str:
    """One spelling for all: musubi-tuner writes _ for the dots."""
    return module.replace(".", "_")


_PATHS = {_plain(module): path for path, modules in LINEARS.items() for module in modules}
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_PREFIXES = re.compile(r"^((base_model|model|transformer|diffusion_model|module)\.|lora_unet_)+")
_MATRIX = re.compile(
    r"(?P<module>.+)\.(?:(?P<a>lora_A|lora_down|lora\.down)|lora_B|lora_up|lora\.up)(\.\w+)?\.weight"
)
_BLOCK = re.compile(r"blocks_(\d{1,6})_", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a LoRA tensor belongs. block: None outside the blocks. side: "a", "b" or "alpha"."""

    path: str
    block: int | None
    side: str

    def module(self, naming: str = "peft") -> str:
        """Its module under the official names, or those of diffusers."""
        return LINEARS[self.path][NAMINGS.index(naming)].format(i=self.block)

    def name(self, naming: str = "peft") -> str:
        return f"{_PREFIX[naming]}{self.module(naming)}.{_SIDES[self.side]}.weight"


def place(name: str) -> Place | None:
    """The place of the tensor called `name`, None where it is no LoRA tensor that we know."""
    bare = _PREFIXES.sub("", _WRAPPERS.sub("", name))
    if bare.endswith(".alpha"):
        module, side = bare.removesuffix(".alpha"), "alpha"
    elif match := _MATRIX.fullmatch(bare):
        module, side = match["module"], "a" if match["a"] else "b"
    else:
        return None
    module = _plain(module)
    block = _BLOCK.match(module)
    path = _PATHS.get(_BLOCK.sub("blocks_{i}_", module, count=1))
    return None if path is None else Place(path, int(block[1]) if block else None, side)


def gather(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], float | None]:
    """A and B by path, the blocks stacked, and alpha where the tensors say it and it is not the
    rank. Each tensor is used once.

    Raises:
      InputError: a tensor is no part of a LoRA, its other half is missing, or shapes do not agree.
    """
    names = _sorted_out(tensors)
    paths = sorted({at.path for at in names})
    a, b = ({path: _stack(tensors, names, path, side) for path in paths} for side in "ab")
    _check_blocks(a, b)
    alphas = {at: _alpha(tensors[n], n) for at, n in names.items() if at.side == "alpha"}
    if all(alpha == a[at.path].shape[-2] for at, alpha in alphas.items()):
        return a, b, None
    if len(set(alphas.values())) > 1:
        raise InputError("alpha differs between layers of the LoRA, which is not supported")
    return a, b, next(iter(alphas.values()))


def _alpha(value: Any, name: str) -> float:
    value = np.asarray(value)
    if value.size != 1 or value.dtype.kind in "bc":
        raise InputError(f"{name} has the shape {list(value.shape)}: alpha is one number")
    return check_alpha(float(value.item()))


def check_alpha(alpha: float | int) -> float | int:
    """The number itself. Raises InputError where float32 cannot hold it."""
    if not abs(alpha) <= float(np.finfo(np.float32).max):
        raise InputError(f"the LoRA's alpha is a finite number, not {alpha:g}")
    return alpha


def _sorted_out(tensors: Mapping[str, Any]) -> dict[Place, str]:
    """The name of the tensor at each place; both halves of every pair are there."""
    places = {name: place(name) for name in tensors}
    unknown = sorted(name for name, at in places.items() if at is None)
    if unknown or not places:
        what = f"unexpected {_some(unknown)}" if unknown else "no tensors"
        raise InputError(f"no LoRA of a Wan transformer: {what}")
    names = {at: name for name, at in places.items()}
    if len(names) < len(places):
        raise InputError(f"{_some(set(places) - set(names.values()))} occurs twice")
    for at in names:
        pair = [Place(at.path, at.block, side) in names for side in "ab"]
        if not all(pair):
            lacking = " and ".join(s for s, there in zip("AB", pair, strict=True) if not there)
            raise InputError(f"{at.module()} lacks its {lacking}")
    return names


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _stack(tensors: Mapping[str, Any], names: Mapping[Place, str], path: str, side: str) -> Any:
    """The tensors of a path, the blocks stacked."""
    blocks = [at.block for at in names if (at.path, at.side) == (path, side)]
    if blocks == [None]:
        return jnp.array(tensors[names[Place(path, None, side)]])  # not a window on the file
    if sorted(blocks) != list(range(len(blocks))):
        raise InputError(f"the LoRA adapts {path} in some blocks only, which is not supported")
    at = [names[Place(path, block, side)] for block in range(len(blocks))]
    parts = [jnp.asarray(tensors[name]) for name in at]
    for name, part in zip(at, parts, strict=True):
        if part.shape != parts[0].shape or part.dtype != parts[0].dtype:
            kinds = " and ".join(f"{x.dtype} {x.shape}" for x in (parts[0], part))
            raise InputError(f"{at[0]} and {name} differ ({kinds}): ranks must agree")
    return jnp.stack(parts)


def _check_blocks(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raises InputError where A and B do not fit each other, or the number of blocks varies."""
    for path in a:
        if min(a[path].ndim, b[path].ndim) < 2:
            raise InputError(f"{path}: A and B are no matrices")
        (*stack, rank, _), (*stack_b, _, rank_b) = a[path].shape, b[path].shape
        if not rank:
            raise InputError(f"{path} has rank 0")
        if rank != rank_b:
            raise InputError(f"{path}: A has rank {rank}, B has rank {rank_b}")
        if not len(stack) == len(stack_b) == path.startswith("blocks."):
            raise InputError(f"{path}: A and B are no matrices")
    depths = {path: x.shape[0] for path, x in a.items() if path.startswith("blocks.")}
    if len(set(depths.values())) > 1:
        least = min(depths, key=depths.get)
        raise InputError(f"the LoRA adapts {least} in some blocks only, which is not supported")


def spread(a: Mapping[str, Any], b: Mapping[str, Any], naming: str) -> dict[str, np.ndarray]:
    """The inverse of `gather`: the tensors as peft (LongLive too) or diffusers name them."""
    tensors = {}
    for path in a:
        for side, stacked in (("a", a[path]), ("b", b[path])):
            blocks = enumerate(np.asarray(stacked)) if stacked.ndim == 3 else [(None, stacked)]
            for block, value in blocks:
                tensors[Place(path, block, side).name(naming)] = np.asarray(value)
    return tensors
