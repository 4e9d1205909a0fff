"""Strictness for every test: 8 CPU devices, strict dtype promotion, full float32 products."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes into compiling programs that run for moments.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
# Threads for collectives of 8 devices, as `longlive_jax.cpu_devices` counts them: the package must
# not be imported before its annotations are checked.
os.environ["PJRT_NPROC"] = "64"

import gc  # noqa: E402
import json  # noqa: E402
import pathlib  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import tempfile  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_threefry_partitionable", True)

# Where the tests run in the background of a shell, Ctrl-C is ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

MAPS = pathlib.Path("/proc/self/maps")
MOST_MAPS = 20_000
GOLDEN = pathlib.Path(__file__).parent / "golden"


# Commands keep compiled programs: here, all workers of one run share them, and the user's own cache
# stays as it is.
WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not WORKER:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="longlive-tests-")


def pytest_unconfigure():
    if not WORKER:
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    """What takes many minutes runs where it is asked for: `-m long`, or by its name."""
    if any("::" in argument for argument in config.args):
        return
    left_out = {"named"} if "long" in config.getoption("-m") else {"named", "long"}
    skipped = [item for item in items if left_out & {mark.name for mark in item.iter_markers()}]
    config.hook.pytest_deselected(items=skipped)
    items[:] = [item for item in items if item not in skipped]


@pytest.fixture(autouse=True)
def room_for_programs():
    """Linux gives a process 65,530 pieces of memory, and every compiled program takes some: the
    compiler crashes where there are no more.
    """
    yield
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def golden():
    """Reads `tests/golden/<family>/<case>.npz` as a dict of arrays."""

    def read(family: str, case: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / family / f"{case}.npz") as file:
            return dict(file)

    return read


@pytest.fixture
def facts():
    """The config and tolerance of a golden case."""

    def read(family: str, case: str) -> dict:
        return json.loads((GOLDEN / family / "index.json").read_text())[case]

    return read
