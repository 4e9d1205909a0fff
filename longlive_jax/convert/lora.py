"""LoRA tensors to ours and back; `lora_names` has the spellings.

Read are pairs of A and B, each with a rank and an alpha of its own, LoKr and LoHa, and differences
of whole parameters: `diff` of a weight, `diff_b` of a bias, `diff_m` of a modulation. What cannot
be a pair becomes such a difference.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from longlive_jax.convert import lora_names
from longlive_jax.convert.finite import finite
from longlive_jax.convert.lora_names import LINEARS, Layer, Place, module_of, name_of
from longlive_jax.convert.table import Row
from longlive_jax.errors import InputError

__all__ = ["LINEARS", "Parts", "Scaling", "check_alpha", "gather", "modules", "spread"]

_MOST_PADDED = 1 << 29  # numbers that zeros beside a LoRA of few blocks or uneven ranks may add
_LYCORIS = {"LoKr": "lokr_", "LoHa": "hada_"}
_FLOATS = (np.float16, np.float32, np.float64)
_FLOATS += (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Alpha as far as it is known apart from the tensors. A layer of which nobody says it has scale
    1.

    Args:
      given: For all layers, before anything that the file says.
      default: Where no tensor says it.
      pattern: The same for single modules, by their names or the ends of these.
      of_root: Divided by the root of the rank (rsLoRA), not by the rank.
    """

    given: float | int | None = None
    default: float | int | None = None
    pattern: Mapping[str, float | int] = dataclasses.field(default_factory=dict)
    of_root: bool = False

    def alpha(self, names: Sequence[str], said: float | None) -> float | int | None:
        """Alpha of the module with these names, of which a tensor says `said`."""
        if self.given is not None or said is not None:
            return said if self.given is None else self.given
        for pattern, alpha in self.pattern.items():
            exact, ending = pattern.startswith("^"), pattern.removeprefix("^").removesuffix("$")
            ending = ending.replace("\\.", ".")
            for name in names:
                if name == ending or (not exact and name.endswith(f".{ending}")):
                    return alpha
        return self.default

    def scale(self, alpha: float | int | None, rank: int) -> float:
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.of_root else rank)


@dataclasses.dataclass(frozen=True)
class Parts:
    """A LoRA as `gather` finds it.

    Args:
      a, b: Matrices by the path of their linear layer, the blocks stacked.
      alpha: Of all of them; None is each one's rank.
      scales: By path, *blocks rank, where one alpha does not describe them.
      changes: What is added to a parameter, by its path, the blocks stacked, in float32.
      skipped: Names of tensors for modules that only an image-to-video model has.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    alpha: float | int | None
    scales: dict[str, np.ndarray]
    changes: dict[str, np.ndarray]
    skipped: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A and B of one layer in one block."""

    name: str
    a: Any
    b: Any
    alpha: float | int | None
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class _Found:
    """Pairs and differences found so far, by path and block."""

    def __init__(self) -> None:
        self.pairs: dict[str, dict[int | None, _Pair]] = collections.defaultdict(dict)
        self.changes: dict[str, dict[int | None, np.ndarray]] = collections.defaultdict(dict)

    def change(self, row: Row | None, block: int | None, value: np.ndarray, name: str) -> None:
        """Adds a difference of a parameter, as PyTorch has it."""
        if row is None:
            raise InputError(f"unexpected {name}: there is no such parameter")
        if row.squeeze and value.ndim == 2:
            value = value[None]
        axes = len(row.axes or (1,)) if not row.squeeze else 3
        if value.ndim != axes:
            raise InputError(f"{name} has {value.ndim} axes, not {axes}")
        value = row.forward(value)
        held = self.changes[row.target]
        if block in held and held[block].shape != value.shape:
            raise InputError(f"{name} has another shape than what else changes {row.target}")
        held[block] = value + held[block] if block in held else value


def gather(
    tensors: Mapping[str, Any], scaling: Scaling | None = None, blocks: int | None = None
) -> Parts:
    """The LoRA in `tensors`, each of which is used once.

    Args:
      tensors: Under any names of `lora_names`.
      scaling: What else is known of alpha.
      blocks: Of the model; None is those of the LoRA. A block that is left out is not changed.

    Raises:
      InputError: a tensor is no part of a LoRA, its other half is missing, or shapes do not agree.
    """
    scaling = scaling or Scaling()
    modules, skipped = _modules(tensors)
    found = _Found()
    for (_, block), parts in sorted(modules.items(), key=lambda item: str(item[0])):
        _take(found, tensors, parts, block, scaling)
    depth = _depth([*found.pairs.values(), *found.changes.values()], blocks)
    paths = sorted(found.pairs)
    for path in paths:
        _check_pairs(path, found.pairs[path])
    _check_padding(found, depth)
    a, b = ({path: _stack(found.pairs[path], depth, side) for path in paths} for side in "ab")
    alpha, scales = _scales(found.pairs, depth, scaling)
    changes = {path: _stack_changes(path, x, depth) for path, x in sorted(found.changes.items())}
    return Parts(a, b, alpha, scales, changes, tuple(skipped))


def check_alpha(alpha: float | int) -> float | int:
    """The number itself. Raises InputError where float32 cannot hold it."""
    if not abs(alpha) <= float(np.finfo(np.float32).max):
        raise InputError(f"the LoRA's alpha is a finite number, not {alpha:g}")
    return alpha


def some(names: Iterable[str]) -> str:
    """The first few of these names."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


_Names = dict[Place, str]


def _modules(
    tensors: Mapping[str, Any],
) -> tuple[dict[tuple[str, int | None], _Names], list[str]]:
    """The names of tensors by module and block, and those of modules for images."""
    places = {name: lora_names.place(name) for name in tensors}
    unknown = sorted(name for name, at in places.items() if at is None)
    if unknown or not places:
        what = f"unexpected {some(unknown)}" if unknown else "no tensors"
        raise InputError(f"no LoRA of a Wan transformer: {what}")
    names = {at: name for name, at in places.items()}
    if len(names) < len(places):
        raise InputError(f"{some(set(places) - set(names.values()))} occurs twice")
    skipped = sorted(name for at, name in names.items() if not at.layers)
    if len(skipped) == len(names):
        raise InputError(f"the LoRA only has parts of an image-to-video model: {some(skipped)}")
    modules: dict[tuple[str, int | None], _Names] = collections.defaultdict(dict)
    for at, name in names.items():
        if not at.layers:
            continue
        if lora_names.other_kind(at):
            raise InputError(
                f"the file holds an adapter of the kind {at.part} ({name}), which is not read:"
                " merge it into its model with the program that it comes from"
            )
        modules[at.module, at.block][at] = name
    return modules, skipped


def _take(
    found: _Found,
    tensors: Mapping[str, Any],
    names: _Names,
    block: int | None,
    scaling: Scaling,
) -> None:
    """Reads what there is of one module in one block."""
    at = next(iter(names))
    layers, where = at.layers, str(at)
    by_part = {place.part: name for place, name in names.items()}
    held = {part: tensors[name] for part, name in by_part.items() if part != "alpha"}
    said = _alpha(tensors[by_part["alpha"]], by_part["alpha"]) if "alpha" in by_part else None
    modules = [module_of(layers[0], block, naming) for naming in lora_names.NAMINGS]
    alpha = scaling.alpha(modules if len(layers) == 1 else [where], said)
    scale = 1.0
    kinds = [kind for kind, start in _LYCORIS.items() if any(p.startswith(start) for p in held)]
    if "a" in held or "b" in held or not held:
        _check_halves(held, where)
        scale = _take_pair(found, held, by_part["a"], layers, block, (alpha, scaling))
    for kind in kinds:
        value, rank = _rebuilt(kind, held, where)
        value = value * np.float32(1 if rank is None else scaling.scale(alpha, rank))
        _spread_over(found, value, layers, block, where)
    if "diff" in held:
        value = _float32(held["diff"], by_part["diff"])
        _spread_over(found, value, layers, block, by_part["diff"])
    for part in {"diff_b", "bias"} & held.keys():
        name = by_part[part]
        value = _float32(held[part], name) * np.float32(scale if part == "bias" else 1)
        for layer, piece in zip(layers, _split(value, len(layers), name), strict=True):
            found.change(layer.bias, block, piece, name)


def _check_halves(held: Mapping[str, Any], where: str) -> None:
    lacking = [side.upper() for side in "ab" if side not in held]
    if lacking:
        raise InputError(f"{where} lacks its {' and '.join(lacking)}")


def _take_pair(
    found: _Found,
    held: Mapping[str, Any],
    name: str,
    layers: Sequence[Layer],
    block: int | None,
    how: tuple[float | int | None, Scaling],
) -> float:
    """Reads A and B of one module. Returns alpha / rank."""
    a, b, (alpha, scaling) = held["a"], held["b"], how
    for x in (a, b):
        if np.dtype(x.dtype).type not in _FLOATS:
            raise InputError(f"{name}: A and B are no floating-point numbers")
    if a.ndim < 2 or a.ndim != b.ndim:
        raise InputError(f"{name}: A and B are no matrices")
    if not a.shape[0]:
        raise InputError(f"{name} has rank 0")
    if a.shape[0] != b.shape[1]:
        raise InputError(f"{name}: A has rank {a.shape[0]}, B has rank {b.shape[1]}")
    scale = scaling.scale(alpha, a.shape[0])
    check_alpha(scale)
    if layers[0].linear:
        if a.ndim != 2:
            raise InputError(f"{name}: A and B are no matrices")
        a, b = jnp.array(_narrow(a, name)), jnp.array(_narrow(b, name))  # no windows on the file
        for layer, piece in zip(layers, _split(b, len(layers), name), strict=True):
            found.pairs[layer.path][block] = _Pair(name, a, piece, alpha, scale)
    else:  # of a convolution
        a, b = _float32(a, name), _float32(b, name)
        if layers[0].weight is None or math.prod(b.shape[2:]) != 1:
            raise InputError(f"{name}: A and B are no matrices")
        value = b.reshape(b.shape[:2]) @ a.reshape(len(a), -1) * np.float32(scale)
        found.change(layers[0].weight, block, value.reshape(len(b), *a.shape[1:]), name)
    return scale


def _spread_over(
    found: _Found, value: np.ndarray, layers: Sequence[Layer], block: int | None, name: str
) -> None:
    for layer, piece in zip(layers, _split(value, len(layers), name), strict=True):
        found.change(layer.weight, block, piece, name)


def _split(value: Any, count: int, name: str) -> list[Any]:
    """The outputs of fused layers, which are equally many."""
    size = value.shape[0] if value.ndim else 0
    if size % count:
        raise InputError(f"{name} has {size} outputs, which are not those of {count} layers")
    step = size // count
    return [value[i * step : (i + 1) * step] for i in range(count)] if count > 1 else [value]


def _rebuilt(kind: str, held: Mapping[str, Any], where: str) -> tuple[np.ndarray, int | None]:
    """The difference of a weight that LoKr or LoHa describe (LyCORIS `lokr.py`, `loha.py`; peft
    has the same), and its rank; None where there is no pair that would have one.
    """
    start = _LYCORIS[kind]
    parts = {p.removeprefix(start): _float32(x, where) for p, x in held.items() if start in p}
    rank, factors = None, []
    for factor in ("w1", "w2"):
        down, up = parts.get(f"{factor}_a"), parts.get(f"{factor}_b")
        whole = parts.get(factor)
        if whole is None and (down is None or up is None):
            raise InputError(f"{where} lacks a part of its {kind}: {factor}")
        if whole is None:
            if down.ndim != 2 or up.ndim != 2 or down.shape[1] != up.shape[0] or not len(up):
                raise InputError(f"{where}: the parts of its {kind} do not fit each other")
            rank = len(up) if rank is None else rank
            whole = down @ up
        if whole.ndim != 2:
            raise InputError(f"{where}: the parts of its {kind} are no matrices")
        factors.append(whole)
    first, second = factors
    if kind == "LoHa":
        if first.shape != second.shape:
            raise InputError(f"{where}: the parts of its {kind} do not fit each other")
        return first * second, rank
    if first.size * second.size > _MOST_PADDED:
        raise InputError(f"{where}: its {kind} is of no Wan transformer")
    return np.kron(first, second), rank


def _narrow(x: Any, name: str) -> Any:
    """float64 as float32, in which nothing may be infinite."""
    return _float32(x, name) if np.dtype(x.dtype) == np.float64 else x


def _float32(x: Any, name: str) -> np.ndarray:
    x = np.asarray(x)
    if x.dtype.type not in _FLOATS:
        raise InputError(f"{name} has the type {x.dtype}, which is none of a difference")
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    if not finite(x):
        raise InputError(f"{name} has numbers that float32 cannot hold")
    return x


def _alpha(value: Any, name: str) -> float:
    value = np.asarray(value)
    if value.size != 1 or value.dtype.kind in "bc":
        raise InputError(f"{name} has the shape {list(value.shape)}: alpha is one number")
    return check_alpha(float(value.item()))


# Stacking.


def _depth(found: Iterable[Mapping[int | None, Any]], blocks: int | None) -> int:
    """Return the number of blocks that are stacked."""
    numbers = [block for held in found for block in held if block is not None]
    last = max(numbers, default=-1)
    if last >= (lora_names.MOST_BLOCKS if blocks is None else blocks):
        here = "no Wan transformer has so many" if blocks is None else f"this one has {blocks}"
        raise InputError(f"the LoRA is of another model: it changes block {last}, {here}")
    return last + 1 if blocks is None else blocks


def _check_pairs(path: str, held: Mapping[int | None, _Pair]) -> None:
    """Raises InputError where the layers of several blocks have other sizes."""
    first = next(iter(held.values()))
    for pair in held.values():
        theirs, ours = ((x.a.shape[1], x.b.shape[0]) for x in (pair, first))
        if theirs != ours:
            sizes = " and ".join(" x ".join(map(str, size)) for size in (ours, theirs))
            raise InputError(f"{first.name} and {pair.name} are of layers of other sizes ({sizes})")


def _check_padding(found: _Found, depth: int) -> None:
    """Raises InputError where a small file would fill much memory with zeros."""
    real = padded = 0
    for held in found.pairs.values():
        sizes = [x.a.shape[1] + x.b.shape[0] for x in held.values()]
        real += sum(x.rank * size for x, size in zip(held.values(), sizes, strict=True))
        count = 1 if None in held else depth
        padded += count * max(x.rank for x in held.values()) * max(sizes)
    for held in found.changes.values():
        sizes = [x.size for x in held.values()]
        real += sum(sizes)
        padded += (1 if None in held else depth) * max(sizes)
    if padded > max(_MOST_PADDED, 8 * real):
        raise InputError("the ranks or the blocks of the LoRA are too uneven")


def _stack(held: Mapping[int | None, _Pair], depth: int, side: str) -> Any:
    """The matrices of a path, the blocks stacked: what is missing is zero."""
    parts = {block: pair.a if side == "a" else pair.b for block, pair in held.items()}
    if None in parts:
        return parts[None]
    kinds = {np.dtype(x.dtype) for x in parts.values()}
    kind = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
    rank = max(pair.rank for pair in held.values())
    axis = "ab".index(side)

    def padded(x: Any) -> Any:
        lacking = [(0, 0), (0, 0)]
        lacking[axis] = (0, rank - x.shape[axis])
        return jnp.pad(x.astype(kind), lacking) if x.shape[axis] < rank else x.astype(kind)

    parts = {block: padded(x) for block, x in parts.items()}
    nothing = jnp.zeros(next(iter(parts.values())).shape, kind)
    return jnp.stack([parts.get(block, nothing) for block in range(depth)])


def _stack_changes(path: str, held: Mapping[int | None, np.ndarray], depth: int) -> np.ndarray:
    if None in held:
        return held[None]
    shapes = {x.shape for x in held.values()}
    if len(shapes) > 1:
        raise InputError(f"the differences of {path} have other shapes in other blocks")
    stacked = np.zeros((depth, *shapes.pop()), np.float32)
    for block, value in held.items():
        stacked[block] = value
    return stacked


def _scales(
    found: Mapping[str, Mapping[int | None, _Pair]], depth: int, scaling: Scaling
) -> tuple[float | int | None, dict[str, np.ndarray]]:
    """One alpha for all pairs if that describes them; else the scale of every row of A."""
    pairs = [pair for held in found.values() for pair in held.values()]
    whole = all(
        len(held) == (1 if None in held else depth) and len({x.rank for x in held.values()}) == 1
        for held in found.values()
    )
    if whole and all(pair.scale == 1 for pair in pairs):
        return None, {}
    alphas = {pair.alpha for pair in pairs}
    if whole and len(alphas) == 1 and not scaling.of_root:
        return alphas.pop(), {}
    scales = {}
    for path, held in found.items():
        rank = max(pair.rank for pair in held.values())
        nothing = np.zeros(rank)
        rows = {block: x.scale * (np.arange(rank) < x.rank) for block, x in held.items()}
        blocks = [None] if None in held else range(depth)
        stacked = np.stack([rows.get(block, nothing) for block in blocks]).astype(np.float32)
        scales[path] = stacked[0] if None in held else stacked
    return None, scales


# Back.


@dataclasses.dataclass(frozen=True)
class Module:
    """A and B of one layer in one block, on their own."""

    layer: Layer
    block: int | None
    a: np.ndarray
    b: np.ndarray
    scale: float

    def name(self, naming: str = "peft") -> str:
        return module_of(self.layer, self.block, naming)


def modules(parts: Parts) -> list[Module]:
    """The pairs, one by one; those of scale 0 are left out. Where several LoRAs were added, their
    scales go into B.
    """
    found = []
    for path in parts.a:
        layer, stacked = lora_names.OF_PATH[path], path.startswith("blocks.")
        a, b = np.asarray(parts.a[path]), np.asarray(parts.b[path])
        rank = a.shape[-2]
        alike = 1.0 if parts.alpha is None else parts.alpha / rank
        scales = np.asarray(parts.scales.get(path, np.full((*a.shape[:-2], rank), alike)))
        for block in range(len(a)) if stacked else [None]:
            rows, one_a, one_b = (x if block is None else x[block] for x in (scales, a, b))
            kept = rows != 0
            if path in parts.scales:
                rows, one_a, one_b = rows[kept], one_a[kept], one_b[:, kept]
            if not len(rows):
                continue
            scale = float(rows[0])
            if (rows != scale).any():
                one_b, scale = one_b.astype(np.float32) * rows, 1.0
            found.append(Module(layer, block, one_a, one_b, scale))
    return found


def spread(parts: Parts, naming: str) -> dict[str, np.ndarray]:
    """The inverse of `gather`: the tensors as peft (LongLive too) or diffusers name them. Alpha is
    not among them.
    """
    tensors = {}
    for module in modules(parts):
        for side, value in (("a", module.a), ("b", module.b)):
            tensors[name_of(module.layer, module.block, side, naming)] = value
    for path, value in parts.changes.items():
        layer = lora_names.OF_PARAMETER[path]
        row = layer.weight if layer.weight and layer.weight.target == path else layer.bias
        part = "diff" if row is layer.weight else "diff_b"
        for block in range(len(value)) if row.stacked else [None]:
            one = np.asarray(value if block is None else value[block])
            if one.any():
                tensors[name_of(layer, block, part, naming)] = np.ascontiguousarray(
                    row.backward(one)
                )
    return tensors


def check_pattern(pattern: Any, name: str) -> dict[str, float | int]:
    """A `rank_pattern` or `alpha_pattern` of peft, of names and numbers.

    Raises:
      InputError: it is something else. Names that are general patterns are not read.
    """
    if not isinstance(pattern, Mapping):
        raise InputError(f"the LoRA's {name} is a group of modules, not {str(pattern)[:40]!r}")
    for key, value in pattern.items():
        if re.search(r"[*+?(){}|\[\]]", str(key)):
            raise InputError(f"the LoRA's {name} has the pattern {str(key)[:60]!r}, not supported")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"the LoRA's {name} has numbers, not {str(value)[:40]!r}")
        check_alpha(value)
    return {str(key).removeprefix("transformer."): value for key, value in pattern.items()}
