"""A training run on disk: asynchronous, each checkpoint whole or not there."""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from longlive_jax import output
from longlive_jax.errors import InputError

State = TypeVar("State")

# What a run cannot change on its way, by its place in the config: what it is called.
FIXED = {
    "model": "model",
    "optimizer.kind": "kind of optimizer",
    "teacher": "teacher",
    "critic": "critic",
    "clips": "cut into clips",
    "steps": "number of the student's steps",
    "timesteps": "list of the student's timesteps",
    "student.learning": "LoRA of the student",
    "fake.learning": "LoRA of the critic",
    "student.optimizer.kind": "kind of the student's optimizer",
    "fake.optimizer.kind": "kind of the critic's optimizer",
}


def of_run(workdir: pathlib.Path, inputs: Iterable[tuple[str, pathlib.Path | None]]) -> Checkpoints:
    """Makes the folder of a run, or finds it there, and returns the checkpoints in it.

    Args:
      workdir: Where checkpoints, metrics and samples go.
      inputs: Files and folders that the run reads, each with its place in the config.

    Raises:
      InputError: the run would write into what it reads, or the folder cannot be made.
    """
    output.check_apart(inputs, [("--workdir", workdir)])
    with output.writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        return Checkpoints(workdir.absolute() / "checkpoints")


def told_by_us(record: logging.LogRecord) -> bool:
    """A filter of what is logged: Orbax tells much of what it does."""
    return "orbax" not in record.pathname or record.levelno > logging.INFO


class Checkpoints:
    """Checkpoints in a folder, the newest `keep` of them.

    One holds the state (sharded as it is), the position in the data, what else the run keeps in
    arrays (the errors of recycling, a sequence on its way), and its config.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int = 2):
        self.folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        names = ("state", "data", "config", "errors")
        self._manager = ocp.CheckpointManager(folder, options=options, item_names=names)

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(
        self,
        state: Any,
        data: dict[str, Any],
        config: dict[str, Any],
        errors: dict[str, Any] | None = None,
    ) -> None:
        """Begins to write; training goes on meanwhile. A step that is there already is left. The
        state has a `step`; `errors` are further arrays.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = {
            "state": ocp.args.StandardSave(state),
            "data": ocp.args.JsonSave(data),
            "config": ocp.args.JsonSave(config),
        }
        if errors is not None:
            items["errors"] = ocp.args.StandardSave(errors)
        try:
            self._manager.save(step, args=ocp.args.Composite(**items))
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def restore(self, like: State, config: dict[str, Any]) -> tuple[State, dict, dict]:
        """The newest checkpoint: state, position in the data, errors. `like`: the shapes, and where
        each leaf goes now, which may be another mesh than it came from.

        Raises:
          InputError: the run had another of what is `FIXED`, or the files are damaged.
        """
        step = self.latest
        began = self.config(step)
        config = json.loads(json.dumps(config))  # tuples are lists there
        for name, word in FIXED.items():
            found, wanted = _at(began, name), _at(config, name)
            if found != wanted:
                raise InputError(
                    f"{self.folder} holds a run that began with another {word}:"
                    f" {json.dumps(found)}, not {json.dumps(wanted)}"
                )
        items = {"state": ocp.args.StandardRestore(like), "data": ocp.args.JsonRestore()}
        if (self.folder / str(step) / "errors").is_dir():
            items["errors"] = ocp.args.StandardRestore()
        found = self._read(step, **items)
        return found["state"], found["data"], found.get("errors") or {}

    def config(self, step: int) -> dict[str, Any]:
        """Of the run that wrote a checkpoint."""
        return self._read(step, config=ocp.args.JsonRestore())["config"]

    def ema(self, step: int, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
        """The averaged weights alone, on the host.

        Raises:
          InputError: they are of another model than `like`, or the files are damaged.
        """
        path = self.folder / str(step) / "state"
        wanted = {"ema": dict(like)}
        as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=as_arrays, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader, self._reading(step):
            found = reader.restore(path, args=args)["ema"]
            for name, x in found.items():  # Orbax takes any shape
                if x.shape != like[name].shape:
                    raise ValueError(f"{name} is {x.shape} there, {like[name].shape} here")
            return found

    def _read(self, step: int, **items: Any) -> Any:
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[:1]
            raise InputError(
                f"the checkpoint of step {step} in {self.folder} is damaged, or is not of such a"
                f" model: {''.join(reason)}"
            ) from error

    def wait(self) -> None:
        """Until everything is written.

        Raises:
          InputError: it could not be, such as for want of space; earlier checkpoints are whole.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def close(self) -> None:
        self._manager.close()

    def _failed(self, error: Exception) -> InputError:
        last = self._manager.latest_step()
        kept = (
            "there is none before it" if last is None else f"the last whole one is of step {last}"
        )
        reason = "".join(str(error).splitlines()[:1])
        return InputError(
            f"a checkpoint could not be written into {self.folder} ({reason}); {kept}"
        )


def _at(config: dict[str, Any], name: str) -> Any:
    """The value in nested dicts, of a path with dots; None of what is empty or not there."""
    for key in name.split("."):
        config = (config or {}).get(key)
    return config or None


def shapes(state: State, places: State) -> State:
    """Every leaf by shape and type, with the place where it is to go."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
    )
