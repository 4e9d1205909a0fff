"""Flags by which the processes of a training run find each other, and their devices."""

import jax
from absl import flags

from longlive_jax import cpu_devices

_CPU = flags.DEFINE_integer(
    "cpu_devices", 0, "Virtual CPU devices, where there is no accelerator.", 0
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", 1, "How many processes run this command.", 1)
_PROCESS = flags.DEFINE_integer("process", 0, "Which of them this is.", 0)
_CLUSTER = flags.DEFINE_bool("cluster", False, "Take these from Slurm, Open MPI or Kubernetes.")


def devices() -> None:
    """Finds the devices of all processes."""
    if _CPU.value:
        cpu_devices.request(_CPU.value)
    if _CLUSTER.value:
        jax.distributed.initialize()
    elif _PROCESSES.value > 1:
        if jax.config.jax_platforms == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
