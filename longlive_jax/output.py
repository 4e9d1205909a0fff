"""Where results go: checks before any work is done, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import pathlib
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator

from longlive_jax import interrupts
from longlive_jax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: what killed runs left stays there
    fcntl = None

FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}  # suffix: container
STDOUT = pathlib.Path("-")
SESSION = "session.json"  # in the folder of a saved session
_PART = ".part"


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns what the system says against writing `path`, such as no space, into `InputError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write {path}: {reason[:1].lower()}{reason[1:]}") from error


class Part:
    """A hidden file or folder beside the one that it becomes: `.out.mp4.5f0c3a1e.part`.

    While it exists its maker holds a lock on it, which ends with the process. What killed runs left
    beside the same name has none: it is removed when the next part is made there.

    Args:
      target: The file or folder to make.
      folder: Whether it is a folder.

    Raises:
      OSError: there is no place for it.
    """

    def __init__(self, target: pathlib.Path, *, folder: bool = False):
        self.target = target
        _remove_abandoned(target)
        self.path = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_PART}")
        if folder:
            self.path.mkdir()
        else:
            self.path.touch(exist_ok=False)
        self._lock = _locked(self.path)

    def finish(self) -> None:
        """Gives it the target's name, in the place of a file that was there."""
        os.replace(self.path, self.target)

    def discard(self) -> None:
        """Removes it, if it has not got its name, and gives the lock back."""
        if self.path.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _locked(path: pathlib.Path) -> int | None:
    """A descriptor that holds a lock on the file or folder; None where there are no locks.

    Raises:
      BlockingIOError: somebody else holds it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned(target: pathlib.Path) -> None:
    """Removes the parts of `target` whose makers are no more."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.????????{_PART}"):
        with contextlib.suppress(OSError):
            lock = _locked(path)  # fails where somebody is writing it
            if lock is None:
                continue
            try:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            finally:
                os.close(lock)


def check_file(path: pathlib.Path) -> None:
    """Raises `InputError` if no file can be put at `path`."""
    with writing(path):
        if not path.parent.is_dir():
            raise InputError(f"cannot write {path}: there is no folder {path.parent}")
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {path}: it is there already and is not a file")
        Part(path).discard()


def check_video(path: pathlib.Path) -> None:
    """`check_file`, and the name must say a format that we write."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"cannot write {path}: the name must end in {', '.join(FORMATS)}")
    check_file(path)


def check_new_folder(path: pathlib.Path) -> None:
    """Raises `InputError` where a new folder, with the folders above it, cannot be made."""
    with writing(path):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path} is there already; name a new folder")
        above = next(parent for parent in path.absolute().parents if parent.exists())
        Part(above / path.name, folder=True).discard()


def check_session(path: pathlib.Path) -> None:
    """Raises `InputError` where no session can be saved: into a new or empty folder, or in the
    place of an earlier session.
    """
    path = pathlib.Path(os.path.realpath(path))  # not the link to it that may be named
    with writing(path):
        try:
            held = list(path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            held = [path] if path.exists() else []
        if not held:
            check_new_folder(path)
        elif (path / SESSION).is_file():
            Part(path / SESSION).discard()
        else:
            raise InputError(f"{path} is there already and holds no session; name another folder")


def check_apart(
    inputs: Iterable[tuple[str, pathlib.Path | None]],
    outputs: Iterable[tuple[str, pathlib.Path | None]],
) -> None:
    """Checks that nothing that is read would be overwritten, and nothing be written twice.

    Links are followed. A new file may lie in a folder that is read.

    Args:
      inputs: Files and folders that are read, each with the flag that names it; None is none.
      outputs: Files and folders that are written; None and standard output are none.

    Raises:
      InputError: an output is an input, or a file in a folder that is one, or another output.
    """
    read = [(flag, _real(path)) for flag, path in inputs if path is not None]
    written: list[tuple[str, pathlib.Path]] = []
    for flag, path in outputs:
        if path is None or path == STDOUT:
            continue
        place = _real(path)
        for source, known in read:
            if _same(place, known):
                raise InputError(f"{flag} {path} is what {source} reads: name another")
            if known in place.parents and place.is_file():
                raise InputError(f"{flag} {path} is a part of what {source} reads: name another")
        for other, known in written:
            if _same(place, known) or known in place.parents or place in known.parents:
                raise InputError(f"{flag} {path} would be in the place of {other}: name another")
        written.append((flag, place))


def _real(path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(os.path.realpath(path))


def _same(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Return whether both are the same file, also by two names of it (hard links)."""
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:  # one of them is not there yet
        return False


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a whole text file; nothing is left under the name if that fails.

    Raises:
      InputError: the file cannot be written.
    """
    with writing(path), interrupts.hold:
        part = Part(path)
        try:
            part.path.write_text(text, encoding="utf-8")
            part.finish()
        finally:
            part.discard()


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
