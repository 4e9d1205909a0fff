"""The one error that is the caller's to put right."""


class InputError(ValueError):
    """What was asked for cannot be done; the message is one clear sentence for who asked."""
