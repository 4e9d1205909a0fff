"""Text files and JSON documents: of bounded size and depth, and refused in one sentence.

Editors of some systems begin a text with a mark of the byte order (BOM), and end its lines in other
ways. Neither reaches who reads a text from here.
"""

from __future__ import annotations

import codecs
import json
import os
import pathlib
import re
from typing import Any, NoReturn

from longlive_jax.errors import InputError

LARGEST = 32 << 20  # bytes; the index of the largest published checkpoint has 0.2 MB
DEEPEST = 64  # brackets within brackets; Python's parser goes to about a thousand
# The mark that a text begins with, and the encoding that it tells. That of UTF-32 begins with that
# of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NOT_BRACKETS = re.compile(r"[^\[\]{}]+")


def read(path: str | os.PathLike[str], *, limit: int = LARGEST) -> Any:
    """The value in a JSON file.

    Raises:
      FileNotFoundError, NotADirectoryError: there is no file of that name.
      InputError: it cannot be read, is too large or too deep, or is not JSON.
    """
    return parse(_bytes(pathlib.Path(path), limit), str(path))


def read_text(path: str | os.PathLike[str], *, limit: int = LARGEST) -> str:
    """The text in a file, as `decode` gives it.

    Raises:
      FileNotFoundError, NotADirectoryError: there is no file of that name.
      InputError: it cannot be read, is too large, or is not in UTF-8.
    """
    return decode(_bytes(pathlib.Path(path), limit), str(path))


def decode(data: bytes, what: str) -> str:
    """The text in these bytes, with lines that end in a line feed alone.

    Args:
      data: In UTF-8, or in the encoding that a byte order mark at its start tells.
      what: Where it is from, for what is said of it.

    Raises:
      InputError: it is in another encoding.
    """
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    try:
        text = data[len(mark) :].decode(_MARKS.get(mark, "utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not in UTF-8: save it as UTF-8 text") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _bytes(path: pathlib.Path, limit: int) -> bytes:
    try:
        if not path.is_file() and path.exists():
            raise InputError(f"{path} is no ordinary file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(size, limit) + 1)  # which takes that much memory at once
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {str(error.strerror).lower()}") from error
    if len(data) > limit:
        raise InputError(f"{path} has more than {limit} bytes, which is no such file")
    return data


def parse(data: bytes | str, what: str, *, line: int = 1) -> Any:
    """Return the value of a JSON text.

    Args:
      data: The text, or its bytes as `decode` reads them.
      what: Where it is from, for what is said of it.
      line: The number of its first line there.

    Raises:
      InputError: it is not JSON in UTF-8, too deep, says a key twice, or holds NaN or Infinity.
    """
    text = data if isinstance(data, str) else decode(data, what)
    _check_depth(text, what)
    try:
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        number = error.lineno + line - 1
        raise InputError(f"{what}, line {number} is not JSON: {error.msg.lower()}") from error
    except ValueError as error:  # a number of thousands of digits, or one of our own
        raise InputError(f"{what} cannot be read as JSON: {error}") from error


def _check_depth(text: str, what: str) -> None:
    depth = 0
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    for bracket in _NOT_BRACKETS.sub("", _STRINGS.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > DEEPEST:
            raise InputError(f"{what} is nested more than {DEEPEST} deep, which is no such file")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'"{next(key for key in keys if keys.count(key) > 1)}" is there twice')
    return found
