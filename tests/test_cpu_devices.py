"""Virtual CPU devices have enough threads for collectives, wherever they come from."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from longlive_jax import cpu_devices, sharding
from longlive_jax.train import collectives
from longlive_jax.train import plan as train_plan

SOURCES = {
    "XLA_FLAGS": ({"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, ""),
    "JAX_NUM_CPU_DEVICES": ({"JAX_NUM_CPU_DEVICES": "4"}, ""),
    "config before": ({}, "import jax; jax.config.update('jax_num_cpu_devices', 4)"),
    "config after": ({}, "import jax, longlive_jax; jax.config.update('jax_num_cpu_devices', 4)"),
    "request": ({}, "from longlive_jax import cpu_devices; cpu_devices.request(4)"),
}
# What a program does: the package is imported, and a mesh of all devices is made.
PROGRAM = """
import warnings

warnings.simplefilter("error")
{before}
import longlive_jax
from longlive_jax import cpu_devices, sharding

assert sharding.make_mesh(seq=4).size == 4
print(cpu_devices._pool_threads())
"""
linux = pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="threads of Linux")


def python(program, **environment):
    """Runs a program on a CPU, in an environment that says nothing of devices or threads."""
    ours = {"XLA_FLAGS", "NPROC", "PJRT_NPROC", "JAX_NUM_CPU_DEVICES"}
    kept = {name: x for name, x in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )


@linux
@pytest.mark.parametrize("source", SOURCES)
def test_wherever_devices_come_from_there_are_threads(source):
    environment, before = SOURCES[source]
    done = python(PROGRAM.format(before=before), **environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == cpu_devices.threads_for(4)


@linux
def test_a_client_with_too_few_threads_is_reported():
    before = "import jax; jax.config.update('jax_num_cpu_devices', 4); jax.devices()"
    done = python(PROGRAM.format(before=before))
    assert "set PJRT_NPROC=32 in the environment, or import longlive_jax before" in done.stderr
    done = python(PROGRAM.format(before=""), JAX_NUM_CPU_DEVICES="4", NPROC="6")
    assert "XLA runs 4 virtual CPU devices on 6 threads" in done.stderr


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}, None),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, "16"),
        ({"JAX_NUM_CPU_DEVICES": "64"}, "256"),
        ({"JAX_NUM_CPU_DEVICES": "4", "PJRT_NPROC": "7"}, "7"),
        ({"JAX_NUM_CPU_DEVICES": "4", "NPROC": "7"}, None),
    ],
)
def test_the_environment_changes_only_for_several_devices(environment, expected):
    """JAX is not imported for it, and what the user has set stays."""
    program = (
        "import os, sys, longlive_jax; print(os.environ.get('PJRT_NPROC'), 'jax' in sys.modules)"
    )
    done = python(program, **environment)
    assert done.stdout.split() == [str(expected), "False"], done.stderr


def test_a_training_step_waits_in_fewer_collectives_than_there_are_threads():
    """A device can wait once in each computation that holds collectives, as XLA runs them."""
    ask = train_plan.Ask("tiny", seconds=2.0, mesh="2x2").check()
    with jax.numpy_dtype_promotion("standard"):
        step = train_plan.lower(ask, sharding.make_mesh(1, 2, 2)).compile()
    bodies, _ = collectives._computations(step.as_text())
    kinds = re.compile(rf" ({collectives.KINDS})(-start)?\(")
    waiting = [name for name, lines in bodies.items() if any(map(kinds.search, lines))]
    assert 2 < len(waiting) < cpu_devices.THREADS_PER_DEVICE
