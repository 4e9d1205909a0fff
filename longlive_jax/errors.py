"""The errors that are the caller's to put right."""


class InputError(ValueError):
    """What was asked for cannot be done; the message is one clear sentence for who asked."""


class EmulationWarning(UserWarning):
    """What was asked for is computed in another way than its name says, for want of hardware."""


class SessionError(InputError):
    """What was asked of a session cannot be done now; the session is as it was before."""
