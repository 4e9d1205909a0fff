"""What `longlive generate` is asked for, and what is wrong with it even before a model is there."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from longlive_jax import output, published, story
from longlive_jax.config import folder_of
from longlive_jax.errors import InputError
from longlive_jax.events import Event, in_order
from longlive_jax.lora_files import LoraFile
from longlive_jax.story import Draft, Story


@dataclasses.dataclass(frozen=True)
class Request:
    """What to make and where to put it."""

    prompt: str = ""
    seconds: float | None = None  # None is what the script says, or 10
    output: pathlib.Path = pathlib.Path("out.mp4")
    events: tuple[Event, ...] = ()
    seed: int | None = None  # None is what the script says, or 0
    steps: int | None = None  # None is the model's own number
    model: str = "tiny"  # or a folder
    json: pathlib.Path | None = None  # "-" is standard output
    image: pathlib.Path | None = None  # what the video begins with
    video: pathlib.Path | None = None  # what it continues
    script: pathlib.Path | None = None  # stories in place of prompt and events
    mode: str | None = None  # of every switch; None is its own
    stream: tuple[tuple[str, Any], ...] = ()  # values in place of the model's `config.stream`
    resume: pathlib.Path | None = None  # a saved session to continue
    save: pathlib.Path | None = None  # where to save the session at the end
    lora: tuple[LoraFile, ...] = ()  # which `load` applies, or a resumed session adapts to

    def check(self) -> list[Draft]:
        """The videos to make, if it can be done as far as can be told without a model.

        Raises:
          InputError: what is wrong with it.
        """
        if self.seconds is not None:
            check_seconds(self.seconds)
        if self.resume is None:
            check_model(self.model)
        elif not (self.resume / "session.json").is_file():
            raise InputError(f"there is no session in {self.resume}")
        drafts = self._scripted() if self.script else [self._told()]
        if self.save and len(drafts) > 1:
            raise InputError(f"{self.script} has {len(drafts)} videos: one session can be saved")
        videos = self.outputs(len(drafts))
        self._check_apart(drafts, videos)
        for path in videos:
            output.check_video(path)
        for path in reports(self.json, len(drafts)):
            output.check_report(path)
        if self.save:
            output.check_session(self.save)
        return drafts

    def _check_apart(self, drafts: Sequence[Draft], videos: Sequence[pathlib.Path]) -> None:
        """Raises InputError for an output that would overwrite an input or another output."""
        inputs = [
            ("--model", folder_of(self.model)),
            *(("--lora", pathlib.Path(file.path)) for file in self.lora),
            ("--script", self.script),
            ("--image", self.image),
            ("--video", self.video),
        ]
        if self.script:
            inputs += [("--script", path) for draft in drafts for path in story.files(draft)]
        outputs = [("--output", path) for path in videos]
        outputs += [("--json", path) for path in reports(self.json, len(drafts))]
        output.check_apart([*inputs, ("--resume", self.resume)], outputs)
        # A session may be saved where it came from: it is in memory by then.
        output.check_apart(inputs, [*outputs, ("--save-session", self.save)])

    def outputs(self, count: int) -> list[pathlib.Path]:
        """The file of each video."""
        return story.outputs(self.output, count)

    def _told(self) -> Draft:
        seconds = story.SECONDS if self.seconds is None else self.seconds
        prompt, events = self.prompt.strip(), self.events
        if self.resume:
            begun = (self.image, self.video, self.seed, self.steps, dict(self.stream).get("rope"))
            if any(value is not None for value in begun):
                raise InputError(
                    "a saved session has its seed, steps, positions and beginning: leave --seed,"
                    " --steps, --rope, --image and --video out"
                )
            events = (*((Event(0.0, "switch", prompt),) if prompt else ()), *events)
        elif not prompt:
            raise InputError(
                'the prompt is empty; say what to make: --prompt "a red circle moves left"'
            )
        for path in filter(None, (self.image, self.video)):
            if not path.is_file():
                raise InputError(f"there is no file {path}")
        if self.image and self.video:
            raise InputError("a video begins with an image or continues a clip, not both")
        events = in_order(events, seconds)
        return Story(prompt, seconds, events, self.seed, self.image, self.video)

    def _scripted(self) -> list[Draft]:
        told = {"--prompt": self.prompt, "--at or --cut": self.events, "--image": self.image}
        told |= {"--video": self.video, "--resume": self.resume}
        for flag, value in told.items():
            if value:
                raise InputError(f"{flag} is told by --script {self.script}: leave one of them out")
        return story.read(self.script)


def reports(path: pathlib.Path | None, count: int) -> list[pathlib.Path | None]:
    """Return where each video's report goes: a file of its own, standard output, or nowhere."""
    if path is None or path == output.STDOUT:
        return [path] * count
    return [*story.outputs(path, count)]


def check_model(model: str) -> None:
    """Raises `InputError` for a name that is neither the shipped model nor a folder."""
    if model != "tiny" and not pathlib.Path(model).is_dir():
        if advice := published.advice(pathlib.Path(model)):
            raise InputError(advice)
        raise InputError(f'unknown model "{model}": say tiny, or name a folder that holds a model')


def check_seconds(seconds: float) -> None:
    """Raises `InputError` for what is not a length."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise InputError(f"--seconds must be a number above 0, not {seconds:g}")
