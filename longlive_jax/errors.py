"""The errors that are the caller's to put right."""

from typing import Any


class InputError(ValueError):
    """What was asked for cannot be done; the message is one clear sentence for who asked."""


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message; pages may follow it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class EmulationWarning(UserWarning):
    """What was asked for is computed in another way than its name says, for want of hardware."""


class SessionError(InputError):
    """What was asked of a session cannot be done now; the session is as it was before."""


class NotFiniteError(SessionError):
    """A chunk holds NaN or infinity. It is not handed over; what came before it stays.

    Args:
      message: One clear sentence.
      session: Whose chunk it is, where several are made together.
    """

    def __init__(self, message: str, session: Any = None):
        super().__init__(message)
        self.session = session
