"""Virtual CPU devices, and enough threads for the collectives between them.

XLA's CPU client runs the programs of all its devices on one pool of threads, by default one per
core, or one per device if there are more devices. A device that waits in a collective blocks a
thread. Within one computation collectives run in order, but XLA starts those behind a loop
(`lax.scan`) while the loop is still running: a device may wait in as many collectives at once as
the program has computations (the entry and loop bodies) that hold collectives. Once every thread
waits, in collectives that other devices have not reached, nothing can run any more, and after
40 seconds XLA aborts the process. A pool with more threads than can ever wait excludes that.

The size of the pool is read from the environment when the first array or device is asked for.
This module therefore imports JAX only where a caller has already done so.
"""

from __future__ import annotations

import os
import pathlib
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

# Programs of training have up to five computations with collectives (a test counts them).
THREADS_PER_DEVICE = 8
MOST_THREADS = 256  # XLA makes its pool no larger
POOL_SIZE = "PJRT_NPROC"  # read before NPROC, and by nothing but XLA
_FORCED = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
_POOL_THREADS = "tf_XLAEigen"  # their name, in Linux


def request(count: int) -> None:
    """Makes `count` virtual CPU devices, unless there are accelerators.

    It must run before the first use of a device; jax raises RuntimeError afterwards.
    """
    import jax

    jax.config.update("jax_num_cpu_devices", count)
    reserve_threads()


def reserve_threads() -> None:
    """Has XLA make enough threads for the virtual CPU devices that were asked for.

    They may come from `jax_num_cpu_devices`, JAX_NUM_CPU_DEVICES or XLA_FLAGS. Nothing changes
    for a single device, or where NPROC or PJRT_NPROC is set already.
    """
    count = _requested()
    if count > 1 and not {"NPROC", POOL_SIZE} & os.environ.keys():
        os.environ[POOL_SIZE] = str(threads_for(count))


def threads_for(count: int) -> int:
    """How many threads the collectives of `count` devices of one process need."""
    return min(count * THREADS_PER_DEVICE, MOST_THREADS)


def check_threads(devices: Sequence[Any]) -> None:
    """Warns if XLA is running with too few threads for collectives of these devices.

    Only Linux tells how many there are; elsewhere nothing is checked.
    """
    import jax

    mine = [x for x in devices if x.platform == "cpu" and x.process_index == jax.process_index()]
    threads, needed = _pool_threads(), threads_for(len(mine))
    if len(mine) > 1 and threads is not None and threads < needed:
        warnings.warn(
            f"XLA runs {len(mine)} virtual CPU devices on {threads} threads, where collectives may"
            f" wait for each other until it aborts: set {POOL_SIZE}={needed} in the environment, or"
            " import longlive_jax before the first use of a device",
            RuntimeWarning,
            stacklevel=3,
        )


def _requested() -> int:
    """How many virtual CPU devices the next client will have; 0 or -1 if nobody has said."""
    forced = _FORCED.findall(os.environ.get("XLA_FLAGS", ""))
    counts = [int(forced[-1])] if forced else []
    jax = sys.modules.get("jax")  # None, too, where importing it is prevented
    if jax is not None:
        counts.append(jax.config.jax_num_cpu_devices)
    elif os.environ.get("JAX_NUM_CPU_DEVICES", "").isdigit():
        counts.append(int(os.environ["JAX_NUM_CPU_DEVICES"]))
    return max(counts, default=0)


def _pool_threads() -> int | None:
    """How many threads XLA's pool has, or None if that cannot be found out."""
    names = []
    for file in pathlib.Path("/proc/self/task").glob("*/comm"):
        try:
            names.append(file.read_text().strip())
        except OSError:  # this thread has ended meanwhile
            continue
    return names.count(_POOL_THREADS) or None
