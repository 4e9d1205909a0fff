"""Virtual CPU devices have enough threads for collectives, wherever they come from."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from longlive_jax import cpu_devices

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


def waiting(text):
    """Computations of a compiled program that hold collectives: as many as can wait at once."""
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    found, name = set(), None
    for line in text.splitlines():
        if line.endswith("{") and " (" in line:
            name = line.split(" (")[0]
        if re.search(rf" ({kinds})(-start)?\(", line):
            found.add(name)
    return found
