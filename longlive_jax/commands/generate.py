"""`longlive generate`: its flags, and the request that they make."""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

from longlive_jax.commands.shared import (
    Load,
    choosing,
    define_model,
    define_time,
    loras_of,
    path_of,
    report_path,
)
from longlive_jax.config import Recache
from longlive_jax.errors import InputError


def define(values: flags.FlagValues) -> None:
    """Flags of `longlive generate`."""
    flags.DEFINE_string("prompt", "", "what to show", flag_values=values)
    define_time("seconds", None, "length of the video, as 90 or 1:30; by default 10", values)
    flags.DEFINE_string("output", "out.mp4", "the video file to write", flag_values=values)
    flags.DEFINE_multi_string(
        "at",
        [],
        '"5: a new prompt" changes the prompt at 5 s, "1:30: a new prompt" at 1 min 30 s',
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "cut", [], '"8: a new scene" cuts to a new shot at 8 s', flag_values=values
    )
    flags.DEFINE_enum(
        "recache",
        None,
        [*Recache.FORMS, "keep", "reset"],
        "what --at does to the memory: re-read it, in one of two forms, keep it, or empty it",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "sinks",
        None,
        list(Recache.SINKS),
        "the sinks of a re-read memory: the video's first frames read anew, those kept as they"
        " are, or the window's first frames",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "rope",
        None,
        ["absolute", "relative"],
        "positions of frames: in the video, or among those in memory",
        flag_values=values,
    )
    flags.DEFINE_string("image", None, "a picture that the video begins with", flag_values=values)
    flags.DEFINE_string("video", None, "a clip that the video continues", flag_values=values)
    flags.DEFINE_string(
        "script",
        None,
        "a story.json, or LongLive's prompt files: .txt, .jsonl, a folder of captions or pictures",
        flag_values=values,
    )
    flags.DEFINE_string("resume", None, "a saved session to continue", flag_values=values)
    flags.DEFINE_string("save-session", None, "where to save the session", flag_values=values)
    define_model(values)


def run(values: flags.FlagValues, load: Load) -> None:
    """`longlive generate`."""
    from longlive_jax import events
    from longlive_jax.request import Request

    changes = [events.parse("switch", text) for text in values.at]
    changes += [events.parse("cut", text) for text in values.cut]
    request = Request(
        prompt=values.prompt,
        seconds=values.seconds,
        output=pathlib.Path(values.output),
        events=tuple(changes),
        seed=values["seed"].value if values["seed"].present else None,
        steps=values.steps,
        model=values.model,
        json=report_path(values),
        image=path_of(values.image),
        video=path_of(values.video),
        script=path_of(values.script),
        mode=values.recache if values.recache in events.MODES else None,
        stream=stream_choices(values),
        resume=path_of(values.resume),
        save=path_of(values["save-session"].value),
        lora=loras_of(values),
    )
    drafts = request.check()

    from longlive_jax import generate  # imports JAX

    generate.run(request, drafts, choosing(load, values))


def stream_choices(values: flags.FlagValues) -> tuple[tuple[str, Any], ...]:
    """What the flags put in the place of values of the model's `StreamConfig`."""
    rereads = values.recache is None or values.recache in Recache.FORMS
    if values.sinks and not rereads:
        raise InputError(f"--sinks is about a memory that is re-read: not with {values.recache}")
    how = {"form": values.recache, "sinks": values.sinks} if rereads else {}
    how = {name: value for name, value in how.items() if value}
    chosen = {"rope": values.rope, "recache": Recache(**how) if how else None}
    return tuple((name, value) for name, value in chosen.items() if value)
