"""Frozen values that check themselves: each field against its annotation, with its range.

`Annotated[int, Range(1, 100)]` is a whole number from 1 to 100. Dataclasses that inherit `Checked`
compare what they are made of when they are made, and `make` builds them from the plain dicts and
lists of a JSON document.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from longlive_jax.errors import InputError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, both included unless `above`: then `least` is left out."""

    least: float | int
    most: float | int
    above: bool = False

    def __contains__(self, value: float | int) -> bool:
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        whole = isinstance(self.most, int)
        ends = (str(n) if whole else f"{n:g}" for n in (self.least, self.most))
        return f"{'above' if self.above else 'from'} {' to '.join(ends)}"


Size = Annotated[int, Range(1, 1 << 20)]
Few = Annotated[int, Range(1, 4096)]
Count = Annotated[int, Range(0, 1 << 20)]
Index = Annotated[int, Range(0, (1 << 31) - 1)]
Number = Annotated[float, Range(-1e9, 1e9)]
Positive = Annotated[float, Range(0, 1e9, above=True)]
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class FieldError(InputError):
    """A field is not what it should be. `path` is its name in the document, `said` the rest."""

    def __init__(self, path: str, said: str):
        self.path, self.said = path, said
        super().__init__(f"{path} {said}")


class Checked:
    """A dataclass whose fields are what their annotations say."""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            _check(getattr(self, name), hint, name)


def _check(value: Any, hint: Any, path: str) -> None:
    if not _fits(value, hint):
        raise FieldError(path, f"is {_words(hint)}, not {_short(value)}")


def make(kind: type[T], data: Any, path: str = "") -> T:
    """A dataclass of that kind, made of plain dicts and lists. path: its place in the document.

    Raises:
      InputError: a field is missing, there is no such field, or it has a wrong value.
    """
    if not isinstance(data, Mapping):
        raise FieldError(path or "it", f"is a group of fields, not {_short(data)}")
    hints, prefix = _hints(kind), f"{path}." if path else ""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in data:
        if name not in fields:
            raise FieldError(f"{prefix}{_short(name)[1:-1]}", "is no field that is known")
    for name, field in fields.items():
        if name not in data and field.default is dataclasses.MISSING:
            raise FieldError(path or "it", f"has no {name}")
    values = {name: made_of(data[name], hints[name], f"{prefix}{name}") for name in data}
    for name, value in values.items():
        _check(value, hints[name], f"{prefix}{name}")
    try:
        return kind(**values)
    except FieldError as error:
        raise FieldError(f"{prefix}{error.path}", error.said) from error
    except ValueError as error:
        raise FieldError(path or "it", f"makes no sense: {error}") from error


def made_of(value: Any, hint: Any, path: str) -> Any:
    """A value of a document as a field of that type holds it: lists are tuples there."""
    hint = _bare(hint)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [part for part in inner if part is not type(None)]
        if value is None or len(parts) > 1:  # of several kinds only a value itself can be told
            return value
        return made_of(value, parts[0], path)
    if dataclasses.is_dataclass(hint):
        return make(hint, value, path)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [inner[0]] * len(value) if inner[-1] is ... else inner
        if len(kinds) != len(value):
            raise FieldError(path, f"is {_words(hint)}, not {_short(value)}")
        pairs = enumerate(zip(value, kinds, strict=True))
        return tuple(made_of(part, kind, f"{path}[{i}]") for i, (part, kind) in pairs)
    if hint is float and _fits(value, float):
        return float(value)  # 3 stands for 3.0
    return value


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    found = typing.get_type_hints(kind, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Annotated:
        kind, *ranges = typing.get_args(hint)
        return _fits(value, kind) and all(value in allowed for allowed in ranges)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = [inner[0]] * len(value) if inner[-1] is ... else inner
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if hint is type(None):
        return value is None
    if hint in (int, float):
        number = isinstance(value, int if hint is int else int | float)
        # An integer may be too long to be a float.
        return number and not isinstance(value, bool) and abs(value) < 1e300
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    if typing.get_origin(hint) is Annotated:
        kind, *ranges = typing.get_args(hint)
        return " ".join([_words(kind), *map(str, ranges)])
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in inner)
    if origin is tuple:
        count = "" if inner[-1] is ... else f"{len(inner)} "
        return f"a list of {count}({_words(inner[0])})"
    if hint is type(None):
        return "nothing (null)"
    return _WORDS.get(hint, "a group of fields")


def _short(value: Any) -> str:
    """A value as it is said; long ones are cut, and huge numbers not written out at all."""
    if isinstance(value, int) and abs(value).bit_length() > 128:
        return f"a number of {abs(value).bit_length()} bits"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    said = repr(value) if not isinstance(value, list | tuple | Mapping) else repr(value)[:200]
    return said if len(said) <= 40 else f"{said[:37]}..."
