"""Makes a model's folder of what a training run has averaged.

python experiments/export_run.py --workdir runs/ar --output models/mine
longlive generate --model models/mine --prompt "a red circle moves left over a black background"
"""

import pathlib
import sys

from absl import app, flags, logging

from longlive_jax.errors import InputError
from longlive_jax.train import export
from longlive_jax.train.checkpoint import told_by_us

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The new folder.", required=True)


def main(_):
    logging.get_absl_handler().addFilter(told_by_us)
    try:
        step = export.run(pathlib.Path(_WORKDIR.value), pathlib.Path(_OUTPUT.value))
    except InputError as error:
        logging.error("%s", error)
        sys.exit(2)
    logging.info("wrote the average of step %d to %s", step, _OUTPUT.value)


if __name__ == "__main__":
    app.run(main)
