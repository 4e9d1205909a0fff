"""Scripts of `experiments/` as modules, several of them in one process."""

import importlib.util
import pathlib
import sys
import types

from absl import flags

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"


def load(name: str) -> types.ModuleType:
    """The module of a script. Its flags are taken back: others may have some of the same names.

    Args:
      name: Of the file in `experiments/`, without its suffix.
    """
    before = set(flags.FLAGS)
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), FOLDER / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, made)  # which dataclasses look themselves up in
    spec.loader.exec_module(made)
    for flag in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, flag)
    return made
