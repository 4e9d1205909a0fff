"""What `longlive generate` is asked for, and what is wrong with it even before a model is there."""

from __future__ import annotations

import dataclasses
import math
import pathlib

from longlive_jax import output
from longlive_jax.errors import InputError
from longlive_jax.events import Event, in_order


@dataclasses.dataclass(frozen=True)
class Request:
    """What to make and where to put it."""

    prompt: str
    seconds: float
    output: pathlib.Path
    events: tuple[Event, ...]
    seed: int
    steps: int | None  # None is the model's own number
    model: str  # "tiny", or a folder
    json: pathlib.Path | None  # "-" is standard output

    def check(self) -> Request:
        """Itself with the events in order, if it can be done as far as can be told without a model.

        Raises:
          InputError: what is wrong with it.
        """
        if not self.prompt.strip():
            raise InputError(
                'the prompt is empty; say what to make: --prompt "a red circle moves left"'
            )
        check_seconds(self.seconds)
        events = in_order(self.events, self.seconds)
        check_model(self.model)
        output.check_video(self.output)
        output.check_report(self.json)
        return dataclasses.replace(self, prompt=self.prompt.strip(), events=events)


def check_model(model: str) -> None:
    """Raises `InputError` for a name that is neither the shipped model nor a folder."""
    if model != "tiny" and not pathlib.Path(model).is_dir():
        raise InputError(f'unknown model "{model}": say tiny, or name a folder that holds a model')


def check_seconds(seconds: float) -> None:
    """Raises `InputError` for what is not a length."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise InputError(f"--seconds must be a number above 0, not {seconds:g}")
