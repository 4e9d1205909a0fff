"""`longlive doctor`: its flags."""

from __future__ import annotations

from absl import flags

from longlive_jax.commands.shared import Load


def define(values: flags.FlagValues) -> None:
    """Flags of `longlive doctor`."""
    flags.DEFINE_boolean("json", False, "as JSON instead of tables", flag_values=values)


def run(values: flags.FlagValues, load: Load) -> None:
    """`longlive doctor`: code 2 where nothing can be generated."""
    from longlive_jax import doctor

    doctor.run(as_json=values.json)
