"""Ctrl-C and other signals at safe points only.

Python raises `KeyboardInterrupt` between any two instructions of the main thread: after a program
took the buffers of a state and before the next state is there, inside a callback of JAX that
swallows it, or while XLA is being torn down. Nothing can be made safe against that, so:

- `hold` delays signals until the end of a block, in any program. Everything that replaces a
  session's state, or completes a file, runs in one.
- A command (`stop`) does not raise at all when a signal comes. It notes the signal, and
  `stop.check` raises where stopping loses nothing: between chunks, layers, files and samples.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any

STOP = (signal.SIGINT, signal.SIGTERM)  # what tells a command to end
# Signals whose handlers commonly raise. Windows has only some of them.
DELAYED = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM")
    if hasattr(signal, name)
)
STOPPED = 130  # exit code, by the convention of shells: 128 + SIGINT

_NOTICE = b"longlive: stopping at the next safe point; Ctrl-C again stops at once\n"
_AT_ONCE = b"longlive: stopped at once\n"


class Hold:
    """Delays signals until the end of the outermost block; see `hold`.

    Only the main thread runs handlers of signals. In other threads a block changes nothing, and
    does not disturb one that the main thread is in.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._pending: list[int] = []
        self._handlers: dict[int, Any] = {}

    @property
    def pending(self) -> bool:
        """Return whether a signal came during the block that the calling thread is in."""
        return bool(self._pending) and _in_main_thread()

    def __enter__(self) -> Hold:
        if not _in_main_thread():
            return self
        if self._depth == 0:
            self._handlers = {}
            try:
                self._delay()
            except BaseException:  # by a signal whose turn had not come yet
                self._restore()
                raise
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        if not _in_main_thread():
            return
        self._depth -= 1
        if self._depth:
            return
        self._restore()

    def _delay(self) -> None:
        for number in DELAYED:
            handler = signal.getsignal(number)
            if callable(handler):  # others run no Python code between two instructions
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def _restore(self) -> None:
        """Puts the handlers back, that of Ctrl-C last, and has them run for what was delayed."""
        pending, self._pending = self._pending, []
        # Each of them may run, and raise, at once: the rest is still done then.
        with contextlib.ExitStack() as stack:
            for number in reversed(pending):
                stack.callback(signal.raise_signal, number)
            for number, handler in self._handlers.items():
                stack.callback(signal.signal, number, handler)

    def _note(self, number: int, frame: object) -> None:
        if number not in self._pending:
            self._pending.append(number)


hold = Hold()  # there is one, since handlers of signals belong to the process


class Stop:
    """A request to end the command that runs; see `stop`."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        """Note signals from here on instead of raising; a second Ctrl-C ends the process."""
        for number in STOP:
            signal.signal(number, self._note)

    def end(self) -> None:
        """Ignore signals from here on: the process is about to end, with its exit code."""
        for number in STOP:
            signal.signal(number, signal.SIG_IGN)

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal came. Called where stopping loses nothing."""
        if self.requested and _in_main_thread():
            raise KeyboardInterrupt

    def _note(self, number: int, frame: object) -> None:
        if not self.requested:
            self.requested = True
            _say(_NOTICE)
        elif number == signal.SIGINT:
            # No unwinding: a program of XLA may be running. Files get their names when they are
            # whole, so at most a hidden one is left, which the next run removes.
            _say(_AT_ONCE)
            os._exit(STOPPED)


stop = Stop()  # of the process


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _say(text: bytes) -> None:
    with contextlib.suppress(OSError):  # standard error may be closed
        os.write(2, text)
