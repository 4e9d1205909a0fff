"""The toy world: an endless procedural video source with captions, 64x64 RGB at 16 frames/s.

One or two bright shapes about 19 pixels wide move on a torus (what leaves on the left comes back on
the right) over a dark, static background. A motion is a closed-form displacement of the time since
it began, so any frame of a video of any length is drawn without the frames before it. A new scene
begins near the centre of the picture, two things near the centres of its left and right halves: the
middle of the *path* (hop, circle) is drawn uniformly within `SPREAD` pixels of that point. This
keeps the first chunk of a video, the one a few-step sampler finds hardest, low in entropy.

A video is a `Script`: segments in which one caption is in force. A segment begins the video
("start"), changes one attribute and leaves everything else, position included ("switch"), or begins
an independent scene ("cut"). Segments begin at chunk boundaries.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, UInt8

from longlive_jax.data.caption import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    VALUES,
    Scene,
    Thing,
    caption,
)
from longlive_jax.events import CUT_PREFIX

SIZE, FPS = 64, 16
SPREAD = 6  # pixels either way, for the place where a scene begins
SPEED = 2.0  # pixels a frame
HOP_HEIGHT, HOP_FRAMES = 16.0, 16
CIRCLE_RADIUS, CIRCLE_FRAMES = 10.0, 32
UNSEEN_PAIRS = (("cyan", "triangle"), ("orange", "square"))
"""(colour, shape) pairs that no training clip holds; they measure composition."""
SEEN_PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in UNSEEN_PAIRS)

RGB = {
    "red": (1.0, 0.05, 0.1),
    "green": (0.1, 0.85, 0.1),
    "blue": (0.1, 0.2, 1.0),
    "yellow": (1.0, 0.95, 0.1),
    "cyan": (0.1, 0.95, 0.95),
    "magenta": (0.95, 0.1, 0.95),
    "orange": (1.0, 0.5, 0.0),
    "white": (1.0, 1.0, 1.0),
}


def _background(name: str) -> UInt8[np.ndarray, "64 64 3"]:
    y, x = np.mgrid[:SIZE, :SIZE] // 8
    dark, light = np.array([0.06, 0.06, 0.10]), np.array([0.30, 0.28, 0.24])
    pattern = {"striped": x % 2, "checkered": (x + y) % 2}.get(name)
    if pattern is None:
        flat = {"black": (0.0, 0.0, 0.0), "grey": (0.24, 0.24, 0.24), "navy": (0.0, 0.04, 0.3)}
        picture = np.broadcast_to(flat[name], (SIZE, SIZE, 3))
    else:
        picture = dark + (light - dark) * pattern[..., None]
    return (picture * 255 + 0.5).astype(np.uint8)


BACKDROPS = {name: _background(name) for name in BACKGROUNDS}


def inside(shape: str, x: np.ndarray, y: np.ndarray, area: float | np.ndarray) -> np.ndarray:
    """Signed distance (pixels, positive inside) to a shape of a given area about its centroid."""
    if shape == "circle":
        return np.sqrt(area / np.pi) - np.hypot(x, y)
    if shape == "square":
        return np.sqrt(area) / 2 - np.maximum(np.abs(x), np.abs(y))
    inradius = np.sqrt(area / (3 * np.sqrt(3)))  # equilateral, one corner up
    return np.minimum(inradius - y, inradius + y / 2 - np.sqrt(0.75) * np.abs(x))


AREAS = {"circle": 283.0, "square": 289.0, "triangle": 250.0}
_PATCH, _SUB = 30, 4  # a shape lies in a patch this wide, and is drawn at quarters of a pixel


def _stamps() -> tuple[np.ndarray, np.ndarray]:
    """The pixels each shape covers: offsets (y, x) [shape, sub, sub, 2, n] and alpha [..., n]."""
    pixel, offset = np.arange(_PATCH) - _PATCH // 2, np.arange(_SUB) / _SUB
    y = pixel[None, None, :, None] + 0.5 - offset[:, None, None, None]
    x = pixel[None, None, None, :] + 0.5 - offset[None, :, None, None]
    drawn = [np.clip(inside(shape, x, y, AREAS[shape]) + 0.5, 0, 1) for shape in SHAPES]
    alpha = np.stack(drawn).reshape(len(SHAPES), _SUB, _SUB, -1)
    covered = (alpha > 0).sum(-1).max()  # the rest of the patch need not be touched
    order = np.argsort(-alpha, axis=-1, kind="stable")[..., :covered]
    offsets = np.stack([pixel[order // _PATCH], pixel[order % _PATCH]], -2)
    return offsets, np.take_along_axis(alpha, order, -1).astype(np.float32)


_OFFSETS, _ALPHA = _stamps()


Times = int | np.integer | np.ndarray


def displacement(motion: str, tau: Times) -> Float[np.ndarray, "*t 2"]:
    """Displacement (x right, y down; pixels) `tau` frames after the motion began."""
    tau, zero = np.asarray(tau, np.float64), np.zeros(np.shape(tau))
    if motion == "bounces":
        x, y = zero, -HOP_HEIGHT * np.abs(np.sin(np.pi * tau / HOP_FRAMES))
    elif motion == "circles":
        angle = 2 * np.pi * tau / CIRCLE_FRAMES
        x, y = CIRCLE_RADIUS * (np.cos(angle) - 1), CIRCLE_RADIUS * np.sin(angle)
    else:
        straight = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
        way = straight.get(motion.split()[-1], (0, 0))
        x, y = SPEED * way[0] * tau, SPEED * way[1] * tau
    return np.stack([x, y], -1)


_PATH_MIDDLE = {"bounces": (0.0, -HOP_HEIGHT / 2), "circles": (-CIRCLE_RADIUS, 0.0)}


def chunk_start(chunk: int, latents: int = 3) -> int:
    """First frame of a chunk of `latents` latent frames; the video's first latent is one frame."""
    return max(0, 4 * latents * chunk - 3)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Frames from `start` on, in which one caption is in force.

    `kind` is "start", "switch" or "cut". Thing i is at `origins[i]` (x, y) plus its motion's
    displacement since frame `began[i]`, which lies before `start` where a switch left it alone.
    """

    start: int
    kind: str
    scene: Scene
    caption: str
    origins: tuple[tuple[float, float], ...]
    began: tuple[int, ...]

    def position(self, thing: int, frame: Times) -> Float[np.ndarray, "*t 2"]:
        """Where a thing's centroid is (x, y) at a frame, not yet wrapped."""
        moved = displacement(self.scene.things[thing].motion, np.asarray(frame) - self.began[thing])
        return np.asarray(self.origins[thing]) + moved


@dataclasses.dataclass(frozen=True)
class Script:
    """A whole video: segments by rising start, the first at frame 0."""

    segments: tuple[Segment, ...]

    def segment(self, frame: int) -> Segment:
        """The segment a frame lies in."""
        return [s for s in self.segments if s.start <= frame][-1]

    def events(self, latents: int = 3) -> tuple[tuple[int, str, str], ...]:
        """(chunk, kind, caption) of every segment, for a model with that many latents a chunk."""
        return tuple((-(-s.start // (4 * latents)), s.kind, s.caption) for s in self.segments)


def draw_scene(rng: np.random.Generator, *, things: int = 1, unseen: bool = False) -> Scene:
    """A random scene; `unseen` admits the held-out pairs. Two things differ in colour."""
    pairs = [(c, s) for c in COLOURS for s in SHAPES] if unseen else list(SEEN_PAIRS)
    drawn: list[Thing] = []
    for _ in range(things):
        free = [p for p in pairs if p[0] not in [t.colour for t in drawn]]
        colour, shape = free[int(rng.integers(len(free)))]
        drawn.append(Thing(colour, shape, MOTIONS[int(rng.integers(len(MOTIONS)))]))
    return Scene(tuple(drawn), BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))])


def draw_switch(rng: np.random.Generator, scene: Scene, attribute: str | None = None) -> Scene:
    """The scene with one attribute (evenly drawn if not named) changed, never to an unseen pair."""
    attribute = attribute or ATTRIBUTES[int(rng.integers(len(ATTRIBUTES)))]
    thing = int(rng.integers(len(scene.things)))
    now, others = scene.things[thing], scene.things[:thing] + scene.things[thing + 1 :]
    taken = {scene.value(attribute, thing)}
    if attribute == "colour":
        taken |= {other.colour for other in others}
        taken |= {colour for colour, shape in UNSEEN_PAIRS if shape == now.shape}
    if attribute == "shape":
        taken |= {shape for colour, shape in UNSEEN_PAIRS if colour == now.colour}
    free = [value for value in VALUES[attribute] if value not in taken]
    return scene.change(attribute, free[int(rng.integers(len(free)))], thing)


def opening(rng: np.random.Generator, scene: Scene, text: str, frame: int = 0) -> Segment:
    """A scene that begins at a frame: the start of a video at 0, a cut anywhere else."""
    centres = [(32, 32)] if len(scene.things) == 1 else [(16, 32), (48, 32)]
    origins = []
    for thing, (x, y) in zip(scene.things, centres, strict=True):
        dx, dy = _PATH_MIDDLE.get(thing.motion, (0.0, 0.0))
        jitter = rng.integers(-SPREAD, SPREAD + 1, 2)
        origins.append((float(x - dx + jitter[0]), float(y - dy + jitter[1])))
    began = (frame,) * len(origins)
    return Segment(frame, "cut" if frame else "start", scene, text, tuple(origins), began)


def switch(last: Segment, scene: Scene, text: str, frame: int) -> Segment:
    """A segment in which `scene` replaces the last one; things stay where they are.

    A thing whose motion changes begins the new motion where it is; others carry on.
    """
    origins, began = list(last.origins), list(last.began)
    for i, (old, new) in enumerate(zip(last.scene.things, scene.things, strict=True)):
        if old.motion != new.motion:
            x, y = last.position(i, frame)
            origins[i], began[i] = (float(x), float(y)), frame
    return Segment(frame, "switch", scene, text, tuple(origins), tuple(began))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What random scripts are made of; rates are probabilities per chunk boundary."""

    switch_rate: float = 0.15
    cut_rate: float = 0.05
    two_things_rate: float = 0.25
    varied: float = 0.5  # share of captions that are not canonical
    latents: int = 3  # latent frames a chunk


def random_script(rng: np.random.Generator, chunks: int, recipe: Recipe | None = None) -> Script:
    """A random video of `chunks` chunks without unseen pairs."""
    recipe = recipe or Recipe()

    def say(scene: Scene) -> str:
        return caption(scene, rng if rng.random() < recipe.varied else None)

    def fresh() -> Scene:
        return draw_scene(rng, things=1 + int(rng.random() < recipe.two_things_rate))

    scene = fresh()
    segments = [opening(rng, scene, say(scene))]
    for chunk in range(1, chunks):
        frame, chance = chunk_start(chunk, recipe.latents), rng.random()
        if chance < recipe.cut_rate:
            scene = fresh()
            segments.append(opening(rng, scene, CUT_PREFIX + say(scene), frame))
        elif chance < recipe.cut_rate + recipe.switch_rate:
            scene = draw_switch(rng, scene)
            segments.append(switch(segments[-1], scene, say(scene), frame))
    return Script(tuple(segments))


def _draw(video: np.ndarray, thing: Thing, place: Float[np.ndarray, "t 2"]) -> None:
    """Blends a thing into uint8 frames [t, 64, 64, 3], in place."""
    quarter = np.rint(place * _SUB).astype(np.int64)
    whole, sub = quarter // _SUB, quarter % _SUB
    stamp = (SHAPES.index(thing.shape), sub[:, 1], sub[:, 0])
    yx = (_OFFSETS[stamp] + whole[:, ::-1, None]) % SIZE  # t 2 n
    frame = np.arange(len(video))[:, None] * SIZE * SIZE
    index = (frame + yx[:, 0] * SIZE + yx[:, 1]).ravel()  # t n
    pixels = video.reshape(-1, 3)
    under = pixels.take(index, axis=0).astype(np.float32)
    colour = np.asarray(RGB[thing.colour], np.float32) * 255
    blended = under + _ALPHA[stamp].reshape(-1, 1) * (colour - under) + 0.5
    pixels[index] = blended.astype(np.uint8)


def render(script: Script, frames: int, start: int = 0) -> UInt8[np.ndarray, "t 64 64 3"]:
    """Frames `start` .. `start + frames` of a script's video; the last segment never ends."""
    video = np.empty((frames, SIZE, SIZE, 3), np.uint8)
    ends = [s.start for s in script.segments[1:]] + [start + frames]
    for segment, end in zip(script.segments, ends, strict=True):
        low, high = max(segment.start, start), min(end, start + frames)
        if low >= high:
            continue
        part = video[low - start : high - start]
        part[:] = BACKDROPS[segment.scene.background]
        for i, thing in enumerate(segment.scene.things):
            _draw(part, thing, segment.position(i, np.arange(low, high)))
    return video


def clips(
    seed: int, *, batch: int, chunks: int, recipe: Recipe | None = None
) -> Iterator[tuple[UInt8[np.ndarray, "b t 64 64 3"], list[Script]]]:
    """Endless batches of whole videos of `chunks` chunks, with their scripts."""
    rng = np.random.default_rng(seed)
    frames = chunk_start(chunks, (recipe or Recipe()).latents)
    while True:
        scripts = [random_script(rng, chunks, recipe) for _ in range(batch)]
        yield np.stack([render(script, frames) for script in scripts]), scripts
