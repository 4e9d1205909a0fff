"""What `distill_dmd.py` and `long_tuning.py` share: their flags, and a run of a config."""

import dataclasses
import pathlib
import sys

import processes
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from longlive_jax import cache_dir, model
from longlive_jax.errors import InputError
from longlive_jax.train import distill_run
from longlive_jax.train.checkpoint import told_by_us
from longlive_jax.train.distill import Clips, Party
from longlive_jax.train.distill_run import DistillConfig
from longlive_jax.train.dmd import DMDConfig
from longlive_jax.train.learning import Learning
from longlive_jax.train.prompts import PromptConfig
from longlive_jax.train.state import OptimizerConfig


def define(default: str):
    """Flags of a launcher whose config is `default` unless it is told another one."""
    config = config_flags.DEFINE_config_file("config", default)
    flags.DEFINE_string("workdir", None, "Checkpoints, metrics, samples.", required=True)
    return config


def config_of(given: ConfigDict) -> DistillConfig:
    """The run that a config file and its overrides describe. It streams as its model does, but for
    what it says of `stream`; `attention` is of clips that are made, and of those that are judged.
    """
    fields = given.to_dict()
    own = model.read_config(model.folder_of(fields["model"]))
    try:
        clips, prompts = Clips(**fields.pop("clips")), fields.pop("prompts")
        attends = dict(attention=fields.pop("attention", "best"))
        stream = dataclasses.replace(own.stream, **attends | fields.pop("stream", {}))
        judge = dict(chunk=stream.chunk, shift=own.sampler.shift) | attends | fields.pop("judge")
        switch = prompts.pop("switch", None)
        return DistillConfig(
            prompts=PromptConfig(
                chunks=clips.length, switch=None if switch is None else tuple(switch), **prompts
            ),
            clips=clips,
            stream=stream,
            judge=DMDConfig(**judge),
            student=_party(fields.pop("student")),
            fake=_party(fields.pop("fake")),
            precision=tuple((who, how) for who, how in fields.pop("precision", {}).items() if how),
            timesteps=tuple(fields.pop("timesteps", ())),
            sample_prompts=tuple(fields.pop("sample_prompts", ())),
            **fields,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"the config does not fit: {error}") from error


def _party(fields: dict) -> Party:
    learning = {name: fields.pop(name) for name in ("rank", "alpha") if name in fields}
    return Party(Learning(**learning), OptimizerConfig(**fields))


def launch(config: ConfigDict) -> None:
    logging.get_absl_handler().addFilter(told_by_us)
    processes.devices()
    cache_dir.enable()
    try:
        run = distill_run.Run(config_of(config), pathlib.Path(flags.FLAGS.workdir))
        run.finish(run.train())
    except InputError as error:
        logging.error("%s", error)
        sys.exit(2)
