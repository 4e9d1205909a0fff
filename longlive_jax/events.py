"""What may change while a video plays: a new prompt in the same shot, or a cut to a new one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from longlive_jax import times
from longlive_jax.errors import InputError

MODES = ("recache", "keep", "reset")


def check_mode(mode: str) -> None:
    """Raises InputError for what is no mode of a switch."""
    if mode not in MODES:
        raise InputError(f'there is no mode "{mode}" of a switch: say {", ".join(MODES)}')


CUT_PREFIX = "The scene transitions. "  # before the prompt of a new shot; LongLive 2.0 section 4.2


@dataclasses.dataclass(frozen=True)
class Event:
    """A change of prompt, from the first chunk on whose first frame is at or after `time_s`."""

    time_s: float | int
    kind: str  # "switch" keeps the shot, "cut" starts a new one
    prompt: str
    mode: str = "recache"  # of a switch: what becomes of the memory; one of `MODES`


def parse(kind: str, text: str) -> Event:
    """Read "TIME: PROMPT", as `times.split` does.

    Raises:
      InputError: there is no time, or no prompt.
    """
    seconds, prompt = times.split(text)
    return Event(seconds, kind, prompt)


def in_order(events: Sequence[Event], seconds: float | int) -> tuple[Event, ...]:
    """The events by time, for a video of that length.

    Raises:
      InputError: an event is before the start or past the end, or two are at the same time.
    """
    ordered = tuple(sorted(events, key=lambda event: event.time_s))
    for event in ordered:
        if not 0 <= event.time_s < seconds:
            place = "past the end of" if event.time_s > 0 else "before the start of"
            raise InputError(
                f'"{event.prompt}" at {event.time_s:g} s is {place} a video of {seconds:g} s'
            )
    for earlier, later in zip(ordered, ordered[1:], strict=False):
        if earlier.time_s == later.time_s:
            raise InputError(
                f"two prompts are to change at {later.time_s:g} s; give each its own time"
            )
    return ordered
