"""Low-rank adapters (LoRA) of the transformer: y = x W + bias + (alpha / rank) (x Aᵀ) Bᵀ.

A `Lora` is a pytree apart from the model. `apply` puts it beside the kernels, unmerged; as that is
a pure function of both, the gradient with respect to the LoRA leaves the base alone:

    jax.grad(lambda lora: loss(apply(dit, lora)))(lora)

`merge` adds it into the kernels (LongLive `utils/lora_utils.py`, `scripts/merge_lora_generator.py`;
peft `tuners/lora/layer.py:Linear`).

Files may hold differences of whole parameters, too (of biases, norms and modulations; LoKr, LoHa).
These are added to the parameters, which stay beside the sums: `bare` gives them back.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import documents, layers, output, weights
from longlive_jax.config import WAN21_T2V_1_3B
from longlive_jax.convert import table
from longlive_jax.convert.lora import (
    Parts,
    Scaling,
    check_alpha,
    check_pattern,
    gather,
    modules,
    some,
    spread,
)
from longlive_jax.convert.lora_names import LINEARS
from longlive_jax.dit.model import DiT
from longlive_jax.errors import InputError
from longlive_jax.lora_files import LoraFile

_MERGE = "merge it first (longlive merge-lora)"
_NOT_DONE = ("use_dora", "fan_in_fan_out", "use_qalora")
_PATCH, _WAN_PATCH = "patch_embedding.kernel", WAN21_T2V_1_3B.dit.patch


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["a", "b", "scales", "changes"],
    meta_fields=["alpha", "notes"],
)
@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters by the path of their linear layer ("blocks.self_attn.q"), the blocks stacked.

    Args:
      a: layers rank in; no layers outside the blocks.
      b: layers out rank.
      alpha: None means that it equals the rank, whatever that is, so that the scale is 1.
      scales: layers rank: of each row of A, where one alpha does not describe the adapters: those
        of several files together, of several ranks or alphas, or of some blocks only.
      changes: What is added to a parameter, by its path ("blocks.self_attn.q.bias").
      notes: What of its file is left out.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    alpha: float | int | None = None
    scales: dict[str, Any] = dataclasses.field(default_factory=dict)
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def rank(self, path: str) -> int:
        return self.a[path].shape[-2]

    def scale(self, path: str) -> float:
        """Return the scale of a layer that has one for all rows."""
        return 1.0 if self.alpha is None else self.alpha / self.rank(path)

    def row_scales(self, path: str) -> Any:
        """Return the scales of the rows of A: layers rank."""
        if path in self.scales:
            return self.scales[path]
        return np.full(self.a[path].shape[:-1], self.scale(path), np.float32)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kernel", "a", "b", "scale"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A kernel with an adapter beside it: what `apply` leaves in place of an array.

    kernel: *layers in out, stored in any way. a: *layers rank in. b: *layers out rank. scale:
    *layers rank, float32; as it is an array, another strength needs no other program.
    """

    kernel: Any
    a: Any
    b: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def dtype(self) -> Any:
        return self.kernel.dtype

    @property
    def bare(self) -> Any:
        return self.kernel

    def __getitem__(self, index: Any) -> LowRank:
        return jax.tree.map(lambda x: x[index], self)

    def change(self) -> jax.Array:
        """Return the difference that the adapter adds to the kernel, in float32."""
        a, b, scale = (jnp.asarray(x).astype(jnp.float32) for x in (self.a, self.b, self.scale))
        return jnp.einsum("...ri,...or->...io", a * scale[..., None], b, precision="highest")

    def dense(self) -> jax.Array:
        """The sum, in float32; kept in the kernel's type."""
        return added(self.kernel, self.change())


@layers.product.register(LowRank)
def _product(kernel: LowRank, x: jax.Array) -> jax.Array:
    """A and B may be float32 masters of a training run: they are cast to x's type here."""
    a, b = (y.astype(x.dtype) for y in (kernel.a, kernel.b))
    low = jnp.einsum("...i,ri->...r", x, a)
    low = (low.astype(jnp.float32) * jnp.asarray(kernel.scale, jnp.float32)).astype(x.dtype)
    low = jnp.einsum("...r,or->...o", low, b)
    return layers.product(kernel.kernel, x) + low


@functools.partial(jax.tree_util.register_dataclass, data_fields=["bare", "value"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Changed:
    """A parameter with a difference added: to everyone who reads it, the sum.

    bare: without it, for another LoRA that comes later. value: with it, in the same type.
    """

    bare: Any
    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def __getitem__(self, index: Any) -> Any:
        return self.value[index]

    def dense(self) -> Any:
        return self.value


def added(x: Any, change: Any) -> jax.Array:
    """The sum in float32, kept in the type of x."""
    sum_ = jnp.asarray(x).astype(jnp.float32) + jnp.asarray(change, jnp.float32)
    return sum_.astype(x.dtype)


def apply(dit: DiT, lora: Lora) -> DiT:
    """`dit` with the LoRA beside its kernels, in place of any that was there. Pairs work on shapes
    too.

    Raises:
      InputError: the LoRA is of another model, or changes whole matrices that are quantised.
    """
    flat = weights.flatten(bare(dit))
    check(lora, {path: leaf.shape for path, leaf in flat.items()})
    for path in lora.a:
        parts = flat[f"{path}.kernel"], lora.a[path], lora.b[path]
        flat[f"{path}.kernel"] = LowRank(*parts, jnp.asarray(lora.row_scales(path)))
    for path, change in lora.changes.items():
        leaf, both = flat[path], change
        if isinstance(leaf, LowRank):
            leaf, both = leaf.kernel, jnp.asarray(change) + leaf.change()
        if not hasattr(leaf, "dtype"):
            raise InputError(
                f"the LoRA changes all of {path.removesuffix('.kernel')}, which is quantised here:"
                " merge it into the model before that is quantised (longlive merge-lora)"
            )
        flat[path] = Changed(leaf, added(leaf, both))
    return weights.unflatten(dit, flat)


def merge(dit: DiT, lora: Lora) -> DiT:
    """`dit` with the LoRA added into its kernels, in float32; the kernels keep their types."""
    return _replace(apply(dit, lora), lambda leaf: leaf.dense())


def bare(dit: DiT) -> DiT:
    """`dit` without a LoRA beside its kernels."""
    return _replace(dit, lambda leaf: leaf.bare)


def _replace(dit: DiT, how: Callable[[LowRank | Changed], Any]) -> DiT:
    flat = weights.flatten(dit)
    if not any(isinstance(leaf, LowRank | Changed) for leaf in flat.values()):
        return dit
    new = {path: how(x) if isinstance(x, LowRank | Changed) else x for path, x in flat.items()}
    return weights.unflatten(dit, new)


def check(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError where the LoRA does not fit parameters of these shapes, by path."""
    theirs = {path: x.shape for path, x in lora.changes.items()}
    for path, a in lora.a.items():
        theirs[f"{path}.kernel"] = (*a.shape[:-2], a.shape[-1], lora.b[path].shape[-2])
    for parameter, shape in theirs.items():
        path, ours = parameter.removesuffix(".kernel"), shapes.get(parameter)
        if ours is None:
            raise InputError(f"the LoRA is of another model: this one has no {path}")
        if tuple(ours) != tuple(shape):
            there, here = (" x ".join(map(str, sizes)) for sizes in (shape, ours))
            raise InputError(f"the LoRA is of another model: {path} is {there} there, {here} here")


def together(adapters: Sequence[tuple[Lora, float | int]]) -> Lora:
    """One LoRA that is the sum of several of one model, each times its strength."""
    if len(adapters) == 1 and adapters[0][1] == 1:
        return adapters[0][0]
    found: dict[str, list[tuple[Any, Any, Any]]] = {}
    changes: dict[str, Any] = {}
    for lora, strength in adapters:
        for path, a in lora.a.items():
            scales = np.float32(strength) * np.asarray(lora.row_scales(path))
            found.setdefault(path, []).append((a, lora.b[path], scales))
        for path, change in lora.changes.items():
            change = np.float32(strength) * np.asarray(change)
            changes[path] = changes[path] + change if path in changes else change
    a = {path: _joined([x[0] for x in parts], -2) for path, parts in found.items()}
    b = {path: _joined([x[1] for x in parts], -1) for path, parts in found.items()}
    scales = {path: np.concatenate([x[2] for x in parts], -1) for path, parts in found.items()}
    notes = tuple(note for lora, _ in adapters for note in lora.notes)
    return Lora(a, b, None, scales, changes, notes)


def _joined(parts: Sequence[Any], axis: int) -> jax.Array:
    kinds = {np.dtype(x.dtype) for x in parts}
    kind = kinds.pop() if len(kinds) == 1 else jnp.float32
    return jnp.concatenate([jnp.asarray(x).astype(kind) for x in parts], axis)


def read_all(
    files: Sequence[LoraFile],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    alpha: float | int | None = None,
) -> Lora | None:
    """The sum of the LoRAs in files, each times its strength; None where there is none of a
    strength other than 0.

    Args:
      files: As they were asked for.
      shapes: Of the model's parameters by path.
      alpha: As in `read`, of all of them.

    Raises:
      InputError: a file holds no LoRA, or one of another model.
    """
    blocks = shapes.get("blocks.modulation", (None,))[0]
    found = []
    for file in files:
        file.check()
        if not file.strength:
            continue
        try:
            lora = fitted(read(file.path, alpha=alpha, blocks=blocks), shapes)
            check(lora, shapes)
        except InputError as error:
            if str(file.path) in str(error):
                raise
            raise InputError(f"{file.path}: {error}") from error
        notes = tuple(f"{file.path}: {note}" for note in lora.notes)
        found.append((dataclasses.replace(lora, notes=notes), file.strength))
    return together(found) if found else None


def fitted(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> Lora:
    """A LoRA without the channels that only an image-to-video transformer takes in: those of the
    image lie after the latents'.
    """
    change, ours = lora.changes.get(_PATCH), shapes.get(_PATCH)
    if change is None or ours is None or len(change) <= ours[0] or change.shape[1:] != ours[1:]:
        return lora
    parts = math.prod(_WAN_PATCH)
    if len(change) % parts or ours[0] % parts:
        return lora
    change = change.reshape(parts, -1, change.shape[-1])
    skipped, kept = change.shape[1], ours[0] // parts
    change = change[:, :kept].reshape(ours)
    note = (
        f"{skipped - kept} of {skipped} input channels of patch_embedding, which only an"
        " image-to-video model has, are skipped"
    )
    notes = (*lora.notes, note)
    return dataclasses.replace(lora, changes=lora.changes | {_PATCH: change}, notes=notes)


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
    path: str | os.PathLike,
    *,
    group: str = "generator_lora",
    alpha: float | int | None = None,
    blocks: int | None = None,
) -> Lora:
    """A LoRA from a file (.safetensors, .pt) or from a folder that peft wrote.

    Args:
      path: The file or folder.
      group: Of a training checkpoint that holds several ("critic_lora").
      alpha: Where the file does not say, as LongLive's do not, it is the rank; a number given here
        wins.
      blocks: Of the model. Blocks that the LoRA leaves out are not changed.

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
        scaling = dataclasses.replace(_scaling(config), given=alpha)
        return _made(gather(checkpoint.groups[found[0]], scaling, blocks))
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


def _scaling(config: Mapping[str, Any]) -> Scaling:
    """Read alpha from peft's config (`tuners/lora/config.py`; LoKr's and LoHa's call it so)."""
    if odd := [name for name in _NOT_DONE if config.get(name)]:
        raise InputError(f"the LoRA was trained with {', '.join(odd)}, which is not supported")
    alpha = config.get("lora_alpha", config.get("alpha"))
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
        raise InputError(f"the LoRA's lora_alpha is a number, not {str(alpha)[:40]!r}")
    pattern = check_pattern(config.get("alpha_pattern") or {}, "alpha_pattern")
    default = None if alpha is None else check_alpha(alpha)
    return Scaling(default=default, pattern=pattern, of_root=bool(config.get("use_rslora")))


def from_tensors(
    tensors: Mapping[str, Any], *, alpha: float | int | None = None, blocks: int | None = None
) -> Lora:
    """A LoRA from tensors under any of the names in `convert/lora_names.py`; each is used once.

    Args:
      tensors: By name.
      alpha: As in `read`.
      blocks: As in `read`.

    Raises:
      InputError: a tensor is no part of a LoRA, its other half is missing, or shapes do not agree.
    """
    given = None if alpha is None else check_alpha(alpha)
    return _made(gather(tensors, Scaling(given=given), blocks))


def _made(parts: Parts) -> Lora:
    notes = ()
    if parts.skipped:
        count = len(parts.skipped)
        what = f"{count} tensor{'s' if count > 1 else ''}"
        notes = (
            f"skipped {what} of modules that only an image-to-video model has:"
            f" {some(parts.skipped)}",
        )
    return Lora(parts.a, parts.b, parts.alpha, parts.scales, parts.changes, notes)


def _parts(lora: Lora) -> Parts:
    return Parts(lora.a, lora.b, lora.alpha, lora.scales, lora.changes)


def export(lora: Lora, naming: str = "peft") -> dict[str, np.ndarray]:
    """Its tensors as peft ("base_model.model.…", LongLive's too) or diffusers name them.

    Raises:
      InputError: diffusers would not read all of it.
    """
    if lora.changes and naming == "diffusers":
        raise InputError(
            "the LoRA changes whole parameters, which diffusers does not read:"
            f" {_MERGE}: {some(lora.changes)}"
        )
    return spread(_parts(lora), naming)


def unscaled(lora: Lora) -> Lora:
    """The same LoRA of scale 1, for files that do not say alpha: LongLive takes rank and alpha from
    its own config, one of each for the linear layers of the blocks, and knows no others.

    The scale goes into B, which is exact for powers of two: they commute with every rounding. Any
    other would make other results than ours, and is refused.

    Raises:
      InputError: LongLive's code would not compute the same with it.
    """
    if lora.changes:
        raise InputError(f"LongLive's code knows no {some(lora.changes)} of a LoRA: {_MERGE}")
    held = modules(_parts(lora))
    ranks = sorted({len(module.a) for module in held})
    if len(ranks) > 1:
        raise InputError(f"LongLive's code takes LoRAs of one rank, not of {ranks}: {_MERGE}")
    if odd := [path for path in lora.a if not path.startswith("blocks.")]:
        raise InputError(f"LongLive's code adapts blocks only, not {odd[0]}: {_MERGE}")
    for module in held:
        if math.frexp(module.scale)[0] != 0.5:
            raise InputError(
                f"LongLive's files cannot say that alpha / rank is {module.scale:g}: {_MERGE}"
            )
    if lora.scales:
        b = {path: _times(x, np.asarray(lora.scales[path])[:, None]) for path, x in lora.b.items()}
    else:
        b = {path: _times(x, lora.scale(path)) for path, x in lora.b.items()}
    return Lora(lora.a, b)


def _times(x: Any, scale: Any) -> np.ndarray:
    """Exact: float16, which would lose its smallest numbers, becomes float32."""
    kind = np.float32 if x.dtype == np.float16 and np.any(scale != 1) else x.dtype
    return np.asarray(x).astype(kind) * np.asarray(scale).astype(kind)


def peft_config(lora: Lora, naming: str = "peft") -> dict[str, Any]:
    """The arguments of `peft.LoraConfig` that describe it."""
    ranks, alphas = {}, {}
    for module in modules(_parts(lora)):
        name, rank = module.name(naming), len(module.a)
        ranks[name] = rank
        alphas[name] = _alpha(lora, module.scale, rank)
    rank, alpha = _most(ranks), _most(alphas)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: x for name, x in alphas.items() if x != alpha},
    }


def _alpha(lora: Lora, scale: float, rank: int) -> float | int:
    if lora.scales:
        return rank if scale == 1 else scale * rank
    return rank if lora.alpha is None else lora.alpha


def _most(values: Mapping[str, Any]) -> Any:
    """Return the value that most modules have; 1 where there are none."""
    held = list(values.values())
    return max(set(held), key=held.count) if held else 1


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
        output.write_text(path / "adapter_config.json", json.dumps(beside, indent=1) + "\n")
