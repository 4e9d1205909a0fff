"""Standard output and standard error of a command that may be closed, full or a broken pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from longlive_jax.errors import InputError

PIPE_CLOSED = 141  # exit code, by the convention of shells: 128 + SIGPIPE


class PipeClosedError(Exception):
    """Whoever read the standard output has gone, as `head` does."""


class Output:
    """Standard output: what cannot be written ends the command with a sentence.

    Args:
      stream: The stream beneath; None is one that was closed before the process began.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._done(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._done(lambda: self._stream.flush())

    def _done(self, act: Any) -> Any:
        if self._stream is None:
            raise InputError("cannot write to standard output: it is closed")
        try:
            return act()
        except BrokenPipeError as error:
            raise PipeClosedError from error
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise InputError(f"cannot write to standard output: {reason}") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Messages(Output):
    """Standard error: what cannot be written is left out, since nobody would see why either."""

    def _done(self, act: Any) -> Any:
        if self._stream is None:
            return None
        with contextlib.suppress(OSError):
            return act()


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Has everything in it write through `Output` and `Messages`.

    What is still in the buffer is written at the end.

    Raises:
      InputError: standard output is full.
      PipeClosedError: nobody reads it.
    """
    output = Output(sys.stdout)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(Messages(sys.stderr)):
        yield
        if sys.stdout is output and output._stream is not None:
            output.flush()


def open_standard_streams() -> None:
    """Opens those of the descriptors 0, 1 and 2 that are closed, as the null device.

    Else the next file that is opened would get such a number, and what libraries report there would
    be written into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one


def forget_output() -> None:
    """Drops what could not be written, which the end of the process would try once more."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
