"""Scenes of the toy world and the English that describes them: one grammar, both ways.

`caption` writes a scene as a sentence, `parse` reads a sentence back. Without a generator the
sentence is the canonical one, "a red circle moves left over a striped background"; with one it is
drawn from a small set of natural variations whose words are all in `WORDS`, so that a word-level
tokenizer is enough.
"""

import dataclasses
import re

import numpy as np

from longlive_jax.events import CUT_PREFIX

COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta", "orange", "white")
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS = ("black", "grey", "navy", "striped", "checkered")

# motion -> ways to say it, the canonical one first
MOTION_PHRASES = {
    "stays still": ("stays still", "is still", "is not moving", "rests"),
    "moves left": ("moves left", "is moving left", "moves to the left", "travels left"),
    "moves right": ("moves right", "is moving right", "moves to the right", "travels right"),
    "moves up": ("moves up", "is moving up", "moves upwards", "travels up"),
    "moves down": ("moves down", "is moving down", "moves downwards", "travels down"),
    "bounces": ("bounces", "is bouncing", "hops", "keeps bouncing"),
    "circles": ("circles", "is circling", "goes in circles", "keeps circling"),
}
MOTIONS = tuple(MOTION_PHRASES)

ATTRIBUTES = ("colour", "shape", "motion", "background")
VALUES = dict(zip(ATTRIBUTES, (COLOURS, SHAPES, MOTIONS, BACKGROUNDS), strict=True))

_THINGS = ("a {colour} {shape}", "the {colour} {shape}", "one {colour} {shape}")
_THINGS += ("a {shape} that is {colour}", "a {colour} coloured {shape}")
_PLACES = ("over a {} background", "on a {} backdrop", "in front of a {} background")
_PLACES += ("against a {} backdrop", "with a {} background behind")
_SENTENCES = ("{clauses} {place}", "{place} {clauses}")
_CLAUSES = ("{thing} {motion}", "there is {thing} that {motion}")


@dataclasses.dataclass(frozen=True)
class Thing:
    """One moving object. Raises `ValueError` for a colour, shape or motion the world lacks."""

    colour: str
    shape: str
    motion: str

    def __post_init__(self):
        for name in ("colour", "shape", "motion"):
            if getattr(self, name) not in VALUES[name]:
                raise ValueError(f"{getattr(self, name)!r} is not a {name} of the toy world")


@dataclasses.dataclass(frozen=True)
class Scene:
    """One or two things over a background; what a caption says and what the judge reads."""

    things: tuple[Thing, ...]
    background: str

    def __post_init__(self):
        if len(self.things) not in (1, 2):
            raise ValueError(f"a scene has one or two things, not {len(self.things)}")
        if self.background not in BACKGROUNDS:
            raise ValueError(f"{self.background!r} is not a background of the toy world")

    def value(self, attribute: str, thing: int = 0) -> str:
        """The value of one of `ATTRIBUTES`, e.g. `"red"` for `"colour"`."""
        return getattr(self if attribute == "background" else self.things[thing], attribute)

    def change(self, attribute: str, value: str, thing: int = 0) -> "Scene":
        """The same scene with one attribute of one thing (or the background) changed."""
        if attribute == "background":
            return dataclasses.replace(self, background=value)
        things = list(self.things)
        things[thing] = dataclasses.replace(things[thing], **{attribute: value})
        return dataclasses.replace(self, things=tuple(things))


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The scene in words: canonical without `rng`, a drawn variation with it."""

    def pick(choices: tuple[str, ...]) -> str:
        return choices[0 if rng is None else int(rng.integers(len(choices)))]

    clause = pick(_CLAUSES)
    clauses = " and ".join(
        clause.format(
            thing=pick(_THINGS).format(colour=thing.colour, shape=thing.shape),
            motion=pick(MOTION_PHRASES[thing.motion]),
        )
        for thing in scene.things
    )
    place = pick(_PLACES).format(scene.background)
    sentence = pick(_SENTENCES).format(clauses=clauses, place=place)
    return re.sub(r"\ba(?= orange)", "an", sentence)


_MOTION_OF = {phrase: motion for motion, said in MOTION_PHRASES.items() for phrase in said}


def _any_of(words) -> re.Pattern:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(r"\b(" + "|".join(map(re.escape, longest_first)) + r")\b")


_COLOUR, _SHAPE, _MOTION = _any_of(COLOURS), _any_of(SHAPES), _any_of(_MOTION_OF)
_BACKGROUND = re.compile(r"\b(" + "|".join(BACKGROUNDS) + r") (?:background|backdrop)\b")


def parse(text: str) -> Scene:
    """The scene a caption describes; the cut prefix, case and punctuation are ignored.

    Raises `ValueError` if the text is not a sentence of the grammar.
    """
    words = " ".join(re.findall(r"[a-z]+", text.removeprefix(CUT_PREFIX).lower()))
    backgrounds = _BACKGROUND.findall(words)
    colours, shapes = _COLOUR.findall(words), _SHAPE.findall(words)
    motions = [_MOTION_OF[phrase] for phrase in _MOTION.findall(words)]
    if len(backgrounds) != 1 or not len(colours) == len(shapes) == len(motions) or not shapes:
        raise ValueError(f"not a caption of the toy world: {text!r}")
    things = tuple(Thing(*parts) for parts in zip(colours, shapes, motions, strict=True))
    return Scene(things, backgrounds[0])


def _words() -> tuple[str, ...]:
    said = [*_THINGS, *_PLACES, *_SENTENCES, *_CLAUSES, *_MOTION_OF, CUT_PREFIX, "an and"]
    text = " ".join([re.sub(r"{\w*}", " ", part) for part in said])
    return tuple(sorted({*re.findall(r"[a-z]+", text.lower()), *COLOURS, *SHAPES, *BACKGROUNDS}))


WORDS = _words()
"""Every word a caption can hold, lower case, sorted."""
