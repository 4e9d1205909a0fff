"""Where results go: checks before any work is done, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator

from longlive_jax.errors import InputError

FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}  # suffix: container
STDOUT = pathlib.Path("-")


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns what the system says against writing `path`, such as no space, into `InputError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write {path}: {reason[:1].lower()}{reason[1:]}") from error


def check_file(path: pathlib.Path) -> None:
    """Raises `InputError` if no file can be put at `path`."""
    with writing(path):
        if not path.parent.is_dir():
            raise InputError(f"cannot write {path}: there is no folder {path.parent}")
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {path}: it is there already and is not a file")
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def check_video(path: pathlib.Path) -> None:
    """`check_file`, and the name must say a format that we write."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"cannot write {path}: the name must end in {', '.join(FORMATS)}")
    check_file(path)


def part(path: pathlib.Path) -> pathlib.Path:
    """A hidden name beside `path`, on the same file system so that renaming is one step."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a whole text file; nothing is left under the name if that fails.

    Raises:
      InputError: the file cannot be written.
    """
    unfinished = part(path)
    try:
        with writing(path):
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_report(path: pathlib.Path | None) -> None:
    """Raises `InputError` if no report can be put there; None is none, "-" is standard output."""
    if path is not None and path != STDOUT:
        check_file(path)


def write_report(path: pathlib.Path | None, text: str) -> None:
    """Writes a report to where `check_report` found room."""
    if path == STDOUT:
        sys.stdout.write(text)
        sys.stdout.flush()
    elif path is not None:
        write_text(path, text)
