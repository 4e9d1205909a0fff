"""Sessions on disk: an Orbax checkpoint of the arrays, and a small JSON file beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from longlive_jax import output, rollout, saved_check, timeline, weights
from longlive_jax.errors import InputError, SessionError
from longlive_jax.model import Model, Origin, load
from longlive_jax.progress import Lock, PendingChunk, Position, Progress, State
from longlive_jax.session import Session
from longlive_jax.undo import Past
from longlive_jax.vae import vae as coder

FACTS, ARRAYS = output.SESSION, "arrays"  # the arrays' folder, of the first save into a folder
KEYS = "turned in space"  # how keys are kept where positions are relative; once they were not

# One at a time, for two may name the same folder. Who holds a session's lock never asks for it.
_writing = Lock()


def write(session: Session, folder: str | os.PathLike) -> None:
    """See `Session.save`. An earlier session in that folder is replaced once this one is whole."""
    folder = pathlib.Path(os.path.realpath(folder))  # not the link to it that may be named
    with _writing:
        output.check_session(folder)
        facts, arrays = _copied(session)
        if (folder / FACTS).is_file():
            _replace(folder, facts, arrays)
        else:
            with weights.new_folder(folder) as stage:
                _write_arrays(stage / ARRAYS, arrays)
                (stage / FACTS).write_text(_text(facts, ARRAYS), "utf-8")


def _copied(session: Session) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is saved, as it is at one moment, in the host's memory."""
    for chunk in session.progress.ahead:
        # Without the lock: copying is then all that others wait for.
        chunk.wait().check(chunk.position)
    with session._held() as place:
        progress, state = place.progress, place.state()
        arrays = jax.tree.map(np.array, _arrays(session.given, progress, state))
    facts = {
        "model": dataclasses.asdict(progress.model.origin),
        "dtype": str(state.text.k.dtype),
        "stream": dataclasses.asdict(progress.model.config.stream),
        "keys": KEYS,
        "fingerprint": progress.model.fingerprint,
        "position": dataclasses.asdict(progress.position),
        "solver": dataclasses.asdict(session.solver),
        "history": progress.past.chunks,
        "seed": int(session.seed),
        "last": progress.last and dataclasses.asdict(progress.last),
        "ahead": [dataclasses.asdict(chunk.position) for chunk in progress.ahead],
        "notes": session.notes,
    }
    return facts, arrays


def _replace(folder: pathlib.Path, facts: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Puts another session in the place of the one in the folder, in one step: new arrays are
    written beside the old ones, then the file that names them is exchanged. Other files stay.
    """
    name = f"{ARRAYS}-{secrets.token_hex(4)}"
    with output.writing(folder):
        try:
            _write_arrays(folder / name, arrays)
            output.write_text(folder / FACTS, _text(facts, name))
        except BaseException:
            shutil.rmtree(folder / name, ignore_errors=True)
            raise
    # Those of the old session, and what killed runs left.
    for path in folder.glob(f"{ARRAYS}*"):
        if path.name != name and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _text(facts: dict[str, Any], arrays: str) -> str:
    return json.dumps(facts | {"arrays": arrays}, indent=1) + "\n"


def _write_arrays(path: pathlib.Path, arrays: dict[str, Any]) -> None:
    try:
        with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
            checkpointer.save(path, arrays)
    except ValueError as error:  # TensorStore has no other; its message has the system's number
        number = re.search(r"os_error_code='(\d+)'", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _arrays(given: Any, progress: Progress, state: State) -> dict[str, Any]:
    """What is saved, as a tree of arrays. The prompt is encoded again."""
    memory = dataclasses.replace(state.rollout, key=jax.random.key_data(state.rollout.key))
    extras = {"given": given, "rest": progress.rest}
    for i, chunk in enumerate(progress.ahead):
        extras[f"ahead_{i}"] = np.asarray(chunk.pixels)[chunk.row]
    return {
        "rollout": _named(memory),
        "carry": _named(state.carry),
        **{name: x for name, x in extras.items() if x is not None},
    }


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by path. Those without a number in them are left out: Orbax has no place for them."""
    paths, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): x for path, x in paths if x.size}


def origin(folder: str | os.PathLike) -> Origin:
    """What `load` must be asked for to have a saved session's model.

    Raises:
      InputError: there is no session, or it is broken.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    return saved_check.read_facts(folder / FACTS).model


def choices(made_by: Origin) -> dict[str, Any]:
    """The keywords of `load`."""
    said = {"vae": made_by.vae, "lora": made_by.lora}
    return said | ({"weights_only": True} if made_by.weights_only else {})


def _loaded(load: Callable[..., Model], made_by: Origin, dtype: Any) -> Model:
    model = load(made_by.name, dtype=dtype, **choices(made_by))
    return model if made_by.precision is None else model.quantized(made_by.precision)


def restore(
    folder: str | os.PathLike,
    *,
    model: Model | None = None,
    vae_device: jax.Device | None = None,
    load: Callable[..., Model] = load,
) -> Session:
    """The session that `Session.save` wrote, to continue as if it had never stopped. What `rewind`
    could take back is not kept.

    Args:
      model: The model it belongs to, if it is loaded already; None loads it as it was.
      load: What loads it.

    Raises:
      InputError: there is no session, or it is broken.
      SessionError: the session belongs to another model.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    facts = saved_check.read_facts(folder / FACTS)
    position, made_by, fingerprint = facts.position, facts.model, facts.fingerprint
    stream, ahead, dtype = facts.stream_choices, list(facts.ahead), jnp.dtype(facts.dtype)
    if stream.get("rope") == "relative" and facts.keys != KEYS:
        raise InputError(
            f"the session in {folder} is of a version that kept keys of relative positions another"
            " way; play it again from its prompts"
        )
    model = model or _loaded(load, made_by, dtype).streaming(**stream)
    if model.fingerprint != fingerprint:
        raise SessionError(
            f'the session in {folder} belongs to another model: it was made with "{made_by.name}"'
            f" ({fingerprint}), not with {model.config.name} ({model.fingerprint})"
        )
    most = saved_check.most_bytes(model, len(ahead))
    arrays = _read(folder, facts.arrays, most)
    lacking = {"rollout", "carry", *(f"ahead_{i}" for i in range(len(ahead)))} - arrays.keys()
    if lacking:
        raise InputError(f"the session in {folder} is broken: it has no {min(lacking)}")
    saved_check.check_arrays(arrays, model, facts, str(folder))
    state = _state(model, arrays, position, folder)
    if vae_device is not None:
        state = dataclasses.replace(state, carry=jax.device_put(state.carry, vae_device))
    given = None if "given" not in arrays else jnp.asarray(arrays["given"])
    progress = _progress(model, position, arrays, ahead)
    if progress.frame < 0:
        raise InputError(f"the session in {folder} is broken: more frames wait than were made")
    progress = dataclasses.replace(progress, past=Past(facts.history), last=facts.last)
    options = dict(given=given, vae_device=vae_device, notes=facts.notes, seed=facts.seed)
    return Session(state, progress, solver=facts.solver, **options)


def _progress(
    model: Model, position: Position, arrays: dict[str, Any], ahead: list[Position]
) -> Progress:
    """With the frames that were made and not handed over."""
    pixels = [jnp.asarray(arrays[f"ahead_{i}"])[None] for i in range(len(ahead))]
    chunks = (PendingChunk(at, x, x, None, 0, None) for at, x in zip(ahead, pixels, strict=True))
    rest = arrays.get("rest")
    made = timeline.first_frame(model.config, position.latents)
    frame = made - sum(x.shape[1] for x in pixels) - (0 if rest is None else len(rest))
    return Progress(model, position, frame, Past(0), tuple(chunks), rest)


def _read(folder: pathlib.Path, name: str, most: int) -> dict[str, Any]:
    """The arrays. name: of their folder. most: bytes that they may have."""
    try:
        with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
            found = checkpointer.metadata(folder / name).item_metadata
            saved_check.check_claims(found, most, folder)
            # As numpy: whichever device wrote them need not be here.
            wanted = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), dict(found.items()))
            return checkpointer.restore(folder / name, wanted)
    except InputError:
        raise
    except Exception as error:  # Orbax and TensorStore do not say which they raise
        # What they say takes a page.
        raise InputError(f"the session in {folder} is broken: {name} cannot be read") from error


def _state(model: Model, arrays: dict, position: Position, folder: pathlib.Path) -> State:
    cfg, text = model.config, model.prompt_kv([position.whole])
    memory = rollout.begin(cfg, [0], text.k.dtype)
    memory = dataclasses.replace(memory, key=jax.random.key_data(memory.key))
    carry = coder.init_carry(model.vae, 1, cfg.height, cfg.width)

    def filled(name: str, like: Any) -> Any:
        paths, structure = jax.tree.flatten_with_path(like)
        held, wanted = arrays[name], _named(like)
        if {n: x.shape for n, x in held.items()} != {n: x.shape for n, x in wanted.items()}:
            raise InputError(f"the session in {folder} is broken: its {name} is of another shape")
        # Copied: what will be donated must not be numpy's.
        leaves = ((held.get(jax.tree_util.keystr(path), x), x.dtype) for path, x in paths)
        return structure.unflatten([jnp.array(x, dtype) for x, dtype in leaves])

    memory, carry = filled("rollout", memory), filled("carry", carry)
    memory = dataclasses.replace(memory, key=jax.random.wrap_key_data(memory.key))
    return State(memory, carry, text)
