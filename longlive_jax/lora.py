"""Low-rank adapters (LoRA) of the transformer: y = x W + bias + (alpha / rank) (x Aᵀ) Bᵀ.

A `Lora` is a pytree apart from the model. `apply` puts it beside the kernels, unmerged; as that is
a pure function of both, the gradient with respect to the LoRA leaves the base alone:

    jax.grad(lambda lora: loss(apply(dit, lora)))(lora)

`merge` adds it into the kernels (LongLive `utils/lora_utils.py`, `scripts/merge_lora_generator.py`;
peft `tuners/lora/layer.py:Linear`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import documents, layers, weights
from longlive_jax.convert import table
from longlive_jax.convert.lora import LINEARS, Place, check_alpha, gather, spread
from longlive_jax.dit.model import DiT
from longlive_jax.errors import InputError

_MERGE = "merge it first (longlive merge-lora)"
_NOT_DONE = ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "use_qalora")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["alpha"])
@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters by the path of their linear layer ("blocks.self_attn.q"), the blocks stacked.

    a: layers rank in. b: layers out rank; no layers outside the blocks. alpha: None means that it
    equals the rank, whatever that is, so that the scale is 1.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    alpha: float | int | None = None

    def rank(self, path: str) -> int:
        return self.a[path].shape[-2]

    def scale(self, path: str) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank(path)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kernel", "a", "b"], meta_fields=["scale"]
)
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A kernel with an adapter beside it: what `apply` leaves in place of an array.

    kernel: *layers in out, stored in any way. a: *layers rank in. b: *layers out rank.
    """

    kernel: Any
    a: Any
    b: Any
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def dtype(self) -> Any:
        return self.kernel.dtype

    def __getitem__(self, index: Any) -> LowRank:
        return jax.tree.map(lambda x: x[index], self)

    def dense(self) -> jax.Array:
        """The sum, in float32; kept in the kernel's type."""
        a, b = (jnp.asarray(x).astype(jnp.float32) for x in (self.a, self.b))
        change = jnp.einsum("...ri,...or->...io", a, b, precision="highest")
        sum_ = jnp.asarray(self.kernel).astype(jnp.float32) + jnp.float32(self.scale) * change
        return sum_.astype(self.kernel.dtype)


@layers.product.register(LowRank)
def _product(kernel: LowRank, x: jax.Array) -> jax.Array:
    """A and B may be float32 masters of a training run: they are cast to x's type here."""
    a, b = (y.astype(x.dtype) for y in (kernel.a, kernel.b))
    low = jnp.einsum("...i,ri->...r", x, a)
    low = jnp.einsum("...r,or->...o", low, b)
    return layers.product(kernel.kernel, x) + low * jnp.asarray(kernel.scale, x.dtype)


def apply(dit: DiT, lora: Lora) -> DiT:
    """`dit` with the LoRA beside its kernels, in place of any that was there. Works on shapes too.

    Raises:
      InputError: the LoRA is of another model.
    """
    flat = weights.flatten(bare(dit))
    check(lora, {path: leaf.shape for path, leaf in flat.items()})
    for path in lora.a:
        parts = flat[f"{path}.kernel"], lora.a[path], lora.b[path]
        flat[f"{path}.kernel"] = LowRank(*parts, lora.scale(path))
    return weights.unflatten(dit, flat)


def merge(dit: DiT, lora: Lora) -> DiT:
    """`dit` with the LoRA added into its kernels, in float32; the kernels keep their types."""
    return _replace(apply(dit, lora), LowRank.dense)


def bare(dit: DiT) -> DiT:
    """`dit` without a LoRA beside its kernels."""
    return _replace(dit, lambda leaf: leaf.kernel)


def _replace(dit: DiT, how: Callable[[LowRank], Any]) -> DiT:
    flat = weights.flatten(dit)
    if not any(isinstance(leaf, LowRank) for leaf in flat.values()):
        return dit
    new = {path: how(x) if isinstance(x, LowRank) else x for path, x in flat.items()}
    return weights.unflatten(dit, new)


def check(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError where the LoRA does not fit kernels of these shapes, by parameter path."""
    for path, a in lora.a.items():
        b = lora.b[path]
        theirs = (*a.shape[:-2], a.shape[-1], b.shape[-2])
        ours = shapes.get(f"{path}.kernel")
        if ours is None:
            raise InputError(f"the LoRA is of another model: this one has no {path}")
        if ours != theirs:
            there, here = (" x ".join(map(str, shape)) for shape in (theirs, ours))
            raise InputError(f"the LoRA is of another model: {path} is {there} there, {here} here")


def init(dit: DiT, rank: int, key: jax.Array, *, alpha: float | int | None = None) -> Lora:
    """A fresh LoRA on every linear layer of the blocks, as LongLive trains it: B is zero, so that
    it changes nothing yet; A is uniform within 1/√in (peft's initial values).
    """
    shapes = {path: leaf.shape for path, leaf in weights.flatten(bare(dit)).items()}
    a, b = {}, {}
    for path in (path for path in LINEARS if path.startswith("blocks.")):
        *stack, inputs, outputs = shapes[f"{path}.kernel"]
        key, draw = jax.random.split(key)
        bound = inputs**-0.5
        a[path] = jax.random.uniform(draw, (*stack, rank, inputs), minval=-bound, maxval=bound)
        b[path] = jnp.zeros((*stack, outputs, rank))
    return Lora(a, b, alpha)


# Files.


def read(
    path: str | os.PathLike, *, group: str = "generator_lora", alpha: float | int | None = None
) -> Lora:
    """A LoRA from a file (.safetensors, .pt) or from a folder that peft wrote.

    group: of a training checkpoint that holds several ("critic_lora"). alpha: where the file does
    not say, as LongLive's do not, it is the rank; a number given here wins.

    Raises:
      InputError: there is no LoRA, or one that cannot be used.
    """
    from longlive_jax.convert.source import open_checkpoint

    path = pathlib.Path(path)
    checkpoint = open_checkpoint(path)
    found = [name for name in (group, "") if name in checkpoint.groups]
    if not found:
        held = ", ".join(sorted(checkpoint.groups))
        raise InputError(f"{path} holds no LoRA: it has {held or 'nothing'}")
    config = _peft_config(path, checkpoint.facts)
    try:
        if alpha is None:
            alpha = _alpha_of(config)
        return from_tensors(checkpoint.groups[found[0]], alpha=alpha)
    except InputError as error:
        if str(path) in str(error):  # of what is found as its tensors are read
            raise
        raise InputError(f"{path}: {error}") from error


def _peft_config(path: pathlib.Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What peft says of the adapter, in the file's metadata (diffusers) or beside it."""
    beside = (
        path / "adapter_config.json" if path.is_dir() else path.with_name("adapter_config.json")
    )
    try:
        if "lora_adapter_metadata" in facts:
            text = str(facts["lora_adapter_metadata"])
        elif beside.is_file() and (path.is_dir() or path.stem == "adapter_model"):
            text = beside.read_bytes()[: documents.LARGEST]
        else:
            text = "{}"
        config = documents.parse(text, f"what {path} says of its LoRA")
        return {name.removeprefix("transformer."): value for name, value in config.items()}
    except InputError:
        raise
    except (OSError, AttributeError) as error:
        raise InputError(f"{path}: what it says of its LoRA cannot be read: {error}") from error


def _alpha_of(config: Mapping[str, Any]) -> float | int | None:
    if odd := [name for name in _NOT_DONE if config.get(name)]:
        raise InputError(f"the LoRA was trained with {', '.join(odd)}, which is not supported")
    alpha, rank = config.get("lora_alpha"), config.get("r")
    if pattern := config.get("alpha_pattern"):
        if alpha != rank or pattern != config.get("rank_pattern"):
            raise InputError("the LoRA has an alpha per layer (alpha_pattern), not supported")
        return None
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
        raise InputError(f"the LoRA's lora_alpha is a number, not {str(alpha)[:40]!r}")
    return None if alpha is None or (alpha == rank) else float(check_alpha(alpha))


def from_tensors(tensors: Mapping[str, Any], *, alpha: float | int | None = None) -> Lora:
    """A LoRA from tensors under any of the names in `convert/lora.py`; each is used once.

    Ranks may differ between the layers of a block, not between blocks. alpha: as in `read`.

    Raises:
      InputError: a tensor is no part of a LoRA, its other half is missing, or shapes do not agree.
    """
    a, b, said = gather(tensors)
    return Lora(a, b, said if alpha is None else check_alpha(alpha))


def export(lora: Lora, naming: str = "peft") -> dict[str, np.ndarray]:
    """Its tensors as peft ("base_model.model.…", LongLive's too) or diffusers name them."""
    return spread(lora.a, lora.b, naming)


def unscaled(lora: Lora) -> Lora:
    """The same LoRA of scale 1, for files that do not say alpha: LongLive takes rank and alpha from
    its own config, one of each for the linear layers of the blocks, and knows no others.

    The scale goes into B, which is exact for powers of two: they commute with every rounding. Any
    other would make other results than ours, and is refused.

    Raises:
      InputError: LongLive's code would not compute the same with it.
    """
    ranks = sorted({lora.rank(path) for path in lora.a})
    if len(ranks) > 1:
        raise InputError(f"LongLive's code takes LoRAs of one rank, not of {ranks}: {_MERGE}")
    if odd := [path for path in lora.a if not path.startswith("blocks.")]:
        raise InputError(f"LongLive's code adapts blocks only, not {odd[0]}: {_MERGE}")
    scale = lora.scale(next(iter(lora.a)))
    if math.frexp(scale)[0] != 0.5:
        raise InputError(f"LongLive's files cannot say that alpha / rank is {scale:g}: {_MERGE}")
    return Lora(lora.a, {path: _times(x, scale) for path, x in lora.b.items()})


def _times(x: Any, scale: float) -> np.ndarray:
    """Exact: float16, which would lose its smallest numbers, becomes float32."""
    kind = np.float32 if x.dtype == np.float16 and scale != 1 else x.dtype
    return np.asarray(x).astype(kind) * np.asarray(scale, kind)


def peft_config(lora: Lora, naming: str = "peft") -> dict[str, Any]:
    """The arguments of `peft.LoraConfig` that describe it."""
    modules = {}
    for path, a in lora.a.items():
        blocks = range(a.shape[0]) if path.startswith("blocks.") else [None]
        modules |= {Place(path, i, "a").module(naming): lora.rank(path) for i in blocks}
    rank = max(set(modules.values()), key=list(modules.values()).count)
    pattern = {module: r for module, r in modules.items() if r != rank}
    return {
        "r": rank,
        "lora_alpha": rank if lora.alpha is None else lora.alpha,
        "target_modules": sorted(modules),
        "rank_pattern": pattern,
        "alpha_pattern": pattern if lora.alpha is None else {},
    }


def save(path: str | os.PathLike, lora: Lora, naming: str = "peft") -> None:
    """Writes one .safetensors file, whole or not at all; its metadata holds rank and alpha, where
    diffusers looks for them. Given a folder's name, writes what `peft.PeftModel.from_pretrained`
    reads: adapter_model.safetensors and adapter_config.json.
    """
    path, config = pathlib.Path(path), peft_config(lora, naming)
    folder, file = path.parent, path.name.removesuffix(".safetensors")
    if path.suffix != ".safetensors":
        folder, file = path, "adapter_model"
    prefix = "transformer." if naming == "diffusers" else ""
    said = json.dumps({prefix + name: value for name, value in config.items()})
    metadata = {"format": "pt", "lora_adapter_metadata": said}
    weights.write(folder, file, table.unchanged(export(lora, naming)), metadata=metadata)
    if folder == path:
        beside = {"peft_type": "LORA", **config}
        (path / "adapter_config.json").write_text(json.dumps(beside, indent=1) + "\n", "utf-8")
