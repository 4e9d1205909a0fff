"""Tunes a model into a long, multi-shot, autoregressive one, by teacher forcing on whole videos.

python experiments/train_ar.py --config=experiments/configs/ar_toy.py --workdir=runs/ar
    --config.source.folder=runs/toy --config.seq=4

Stop it at any time; the same command goes on from the last checkpoint, also on another number of
devices. With several processes (`--processes`, or under Slurm, Open MPI or Kubernetes) each runs
this command.
"""

import dataclasses
import pathlib
import sys

import processes
from absl import app, flags, logging
from longlive_kernels.nvfp4.linear import Recipe
from ml_collections import ConfigDict, config_flags

import longlive_jax
from longlive_jax import cache_dir
from longlive_jax.errors import InputError
from longlive_jax.train import trainer
from longlive_jax.train.ar import ARConfig
from longlive_jax.train.checkpoint import told_by_us
from longlive_jax.train.recycling import RecyclingConfig
from longlive_jax.train.source import SourceConfig
from longlive_jax.train.state import OptimizerConfig

_WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints, metrics, samples.", required=True)
_CONFIG = config_flags.DEFINE_config_file("config", "experiments/configs/ar_toy.py")


def config_of(given: ConfigDict, model: longlive_jax.Model) -> trainer.TrainConfig:
    """The run that a config file and its overrides describe."""
    fields = given.to_dict()
    recycling, nvfp4 = fields.pop("recycling", None), fields.pop("nvfp4", None)
    try:
        stream = dataclasses.replace(model.config.stream, **fields["ar"].pop("stream", {}))
        return trainer.TrainConfig(
            source=SourceConfig(**fields.pop("source")),
            ar=ARConfig(stream, **fields.pop("ar")),
            optimizer=OptimizerConfig(**fields.pop("optimizer")),
            recycling=None if recycling is None else RecyclingConfig(**recycling),
            nvfp4=None if nvfp4 is None else Recipe(**nvfp4),
            sample_prompts=tuple(fields.pop("sample_prompts", ())),
            **fields,
        )
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"the config does not fit: {error}") from error


def main(_):
    logging.get_absl_handler().addFilter(told_by_us)
    processes.devices()
    cache_dir.enable()
    try:
        model = longlive_jax.load(_CONFIG.value.model)
        run = trainer.Run(config_of(_CONFIG.value, model), model, pathlib.Path(_WORKDIR.value))
        run.train()
    except InputError as error:
        logging.error("%s", error)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
