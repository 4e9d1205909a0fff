"""Checks of a saved session, before anything is made of it."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import documents, fields, rollout, timeline
from longlive_jax.config import StreamConfig
from longlive_jax.convert.finite import finite
from longlive_jax.errors import InputError
from longlive_jax.fields import Checked, Range
from longlive_jax.model import Model, Origin
from longlive_jax.progress import Chunk, Position, Receipt
from longlive_jax.sampler import KEEP, Solver, Step
from longlive_jax.vae import vae as coder

DTYPES = ("float32", "bfloat16", "float16")
MOST_STEPS = 1000
COUNTED = range(timeline.LONGEST)


@dataclasses.dataclass(frozen=True)
class Facts(Checked):
    """The JSON file of a session. stream: only `given_stream` of it was written down. arrays: the
    folder of arrays, which sessions of earlier versions do not name.
    """

    model: Origin
    dtype: str
    stream: StreamConfig
    fingerprint: str
    position: Position
    solver: Solver
    history: fields.Count
    seed: Annotated[int, Range(-(1 << 63), (1 << 64) - 1)]
    last: Chunk | None
    ahead: tuple[Position, ...]
    notes: tuple[str, ...]
    keys: str | None = None
    given_stream: tuple[str, ...] = ()
    arrays: str = "arrays"

    @property
    def stream_choices(self) -> dict[str, Any]:
        """The keywords of `Model.streaming`."""
        return {name: getattr(self.stream, name) for name in self.given_stream}


def read_facts(path: pathlib.Path) -> Facts:
    """The facts of the session in a folder, each of which is what it should be.

    Raises:
      InputError: there is no session, or it is broken.
    """
    folder = path.parent
    try:
        data = documents.read(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"there is no session in {folder}") from error
    except InputError as error:
        said = str(error).replace(str(path), path.name)
        raise InputError(f"the session in {folder} cannot be read: {said}") from error
    if not isinstance(data, dict):
        raise InputError(f"the session in {folder} is broken: {path.name} makes no sense")
    known = {field.name for field in dataclasses.fields(Facts)} - {"given_stream"}
    stream = data.get("stream")
    given = tuple(stream) if isinstance(stream, dict) else ()
    kept = {name: value for name, value in data.items() if name in known}
    kept |= _of_one_lora(kept.get("model"))
    try:
        facts = fields.make(Facts, kept | {"given_stream": given})
        _check(facts)
    except InputError as error:
        said = f"{path.name}: {error}"
        raise InputError(f"the session in {folder} is broken: {said}") from error
    return facts


def _of_one_lora(model: Any) -> dict[str, Any]:
    """The model of a session of an earlier version, which had one LoRA without a strength."""
    if not isinstance(model, dict) or not isinstance(model.get("lora"), str):
        return {}
    return {"model": model | {"lora": [{"path": model["lora"]}]}}


def _check(facts: Facts) -> None:
    """Check what the annotations of these fields do not express."""
    if re.fullmatch("arrays(-[0-9a-f]{1,32})?", facts.arrays) is None:
        raise fields.FieldError("arrays", "is a folder beside it, named by us")
    if facts.dtype not in DTYPES:
        raise fields.FieldError("dtype", f"is one of {', '.join(DTYPES)}")
    _check_steps(facts.solver.steps)
    positions = {"position": facts.position}
    positions |= {f"ahead[{i}]": position for i, position in enumerate(facts.ahead)}
    for path, position in positions.items():
        _check_counts(path, position, position.changes)
        if position.latents != position.chunk * facts.stream.chunk:
            said = f"are {facts.stream.chunk} for each of its {position.chunk} chunks"
            raise fields.FieldError(f"{path}.latents", said)
    chunks = [position.chunk for position in facts.ahead]
    first = facts.position.chunk - len(chunks)
    if chunks != list(range(first, facts.position.chunk)) or first < 0:
        raise fields.FieldError("ahead", "are the last chunks before position")
    if facts.last is not None:
        _check_counts("last", facts.last, facts.last.changes)


def _check_steps(steps: tuple[Step, ...]) -> None:
    if not 1 <= len(steps) <= MOST_STEPS:
        raise fields.FieldError("solver.steps", f"are 1 to {MOST_STEPS}, not {len(steps)}")
    for step in steps:
        if len(step.correct) != len(KEEP) or len(step.predict) != len(KEEP) - 1:
            raise fields.FieldError("solver.steps", "have 5 numbers to correct and 4 to predict")
        if not (0 <= step.sigma <= 1 and 0 <= step.timestep <= 1000):
            raise fields.FieldError("solver.steps", "go from timestep 1000 and sigma 1 to 0")
        if max(map(abs, (*step.correct, *step.predict))) > 1e6:
            raise fields.FieldError("solver.steps", "have coefficients of an ordinary size")


def _check_counts(path: str, value: Position | Chunk, changes: tuple[Receipt, ...]) -> None:
    counts = {f"{path}.changes": change.frame for change in changes}
    for name in ("chunk", "latents", "index", "frame"):
        counts[f"{path}.{name}"] = getattr(value, name, 0)
    for name, count in counts.items():
        if count not in COUNTED:
            raise fields.FieldError(name, f"is a count below 2^31, not {count}")


def most_bytes(model: Model, ahead: int) -> int:
    """The size of the largest session of a model, with that many chunks that wait."""
    cfg = model.config

    def begun() -> list[jax.Array]:
        memory = rollout.begin(cfg, [0], jnp.float32)
        memory = dataclasses.replace(memory, key=jax.random.key_data(memory.key))
        return jax.tree.leaves((memory, coder.init_carry(model.vae, 1, cfg.height, cfg.width)))

    frames = (ahead + 2) * cfg.frames_per_chunk * cfg.height * cfg.width * 3
    return frames + sum(2 * 4 * x.size for x in jax.eval_shape(begun))


def check_claims(found: Any, most: int, folder: pathlib.Path) -> None:
    """Raises InputError where the arrays of these shapes and types are more than `most` bytes."""
    claimed = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(found))
    if claimed > most:
        raise InputError(
            f"the session in {folder} is broken: its arrays claim {claimed} bytes, and no session"
            f" of this model has more than {most}"
        )


def check_arrays(arrays: Mapping[str, Any], model: Model, facts: Facts, folder: str) -> None:
    """Raises InputError where an array is of another kind than a session's, or not finite."""
    cfg = model.config
    size = (cfg.height, cfg.width, 3)
    for i, position in enumerate(facts.ahead):
        latents = position.latents
        ends = (timeline.first_frame(cfg, n) for n in (latents, latents + cfg.stream.chunk))
        start, end = ends
        _check_frames(arrays[f"ahead_{i}"], (end - start, *size), f"ahead_{i}", folder)
    if (rest := arrays.get("rest")) is not None:
        count = len(rest) if getattr(rest, "ndim", 0) == 4 else 0
        _check_frames(rest, (min(count, cfg.frames_per_chunk), *size), "rest", folder)
    if (given := arrays.get("given")) is not None:
        shape = (1, 1, cfg.latent_height, cfg.latent_width, cfg.dit.channels)
        if getattr(given, "shape", None) != shape or not jnp.issubdtype(given.dtype, jnp.floating):
            raise InputError(f"the session in {folder} is broken: its given is of another shape")
    for name, part in arrays.items():
        for x in jax.tree.leaves(part):
            if not finite(np.asarray(x)):
                raise InputError(
                    f"the session in {folder} is broken: its {name} holds NaN or infinity"
                )


def _check_frames(x: Any, shape: tuple[int, ...], name: str, folder: str) -> None:
    if getattr(x, "shape", None) != shape or x.dtype != np.uint8:
        raise InputError(f"the session in {folder} is broken: its {name} is of another shape")
