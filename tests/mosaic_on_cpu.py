"""Mosaic GPU kernels on the CPU: the simulator that comes with JAX, and what it lacks."""

import contextlib
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import callback
from jax._src.core import eval_jaxpr
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from longlive_kernels import jax_versions

PROGRAMS = {}
COMPILING = threading.Lock()


def run_jaxpr(jaxpr, consts, *args):
    """The simulator's own compiles a kernel anew for every warpgroup of every block."""
    with COMPILING:
        if jaxpr not in PROGRAMS:
            run = jax.jit(lambda consts, *args: eval_jaxpr(jaxpr, consts, *args))
            PROGRAMS[jaxpr] = run.lower(consts, *args).compile()
    PROGRAMS[jaxpr](consts, *args)


def called(*args, callback, **_):
    """JAX's own makes one of its arrays of every number that a callback is given: most of the
    simulator's time.
    """
    return jax.tree.map(np.asarray, callback(*args))


def integer(x):
    """Of what `called` hands on, or of a trace."""
    return x if isinstance(x, jax.core.Tracer) else int(x)


class Total:
    """Stands in for an accumulator."""

    def __init__(self, value):
        self.value, self.shape = value, value.shape

    def __getitem__(self, index):
        return self.value


def load(ref, **_):
    """All of a reference.

    Since jax 0.11 the simulator reports a race where a copy writes what a thread has read, unless
    there is a fence of proxies between them. Tensor cores, whose products are plain ones here, need
    none, as they read by the same proxy as copies. Nor does a thread that arrives at a barrier with
    what it read in registers: JAX's own attention has no fence there.
    """
    value = ref[...]
    plgpu.commit_smem()
    return value


def multiply(total: Total, left, right):
    left, right = (x if isinstance(x, jax.Array) else load(x) for x in (left, right))
    product = left.astype(jnp.float32) @ right.astype(jnp.float32)
    total.value += product.astype(total.value.dtype)


def multiply_to_memory(total, left, right, barrier=None, *, accumulate=True):
    """Stands in for a product of Blackwell's, which is done as it is asked for."""
    result = Total(total[...] if accumulate else jnp.zeros(total.shape, jnp.float32))
    multiply(result, left, right)
    total[...] = result.value
    if barrier is not None:
        plgpu.barrier_arrive(barrier)


class TensorMemory:
    """Stands in for the memory of tensor cores. Threads see what they store there once they have
    committed it: kernels are looked at as they are traced.
    """

    def __init__(self):
        self.stored = []  # and not committed

    def store(self, part, value):
        self.stored.append(part.ref)
        part[...] = value

    def commit(self):
        self.stored.clear()

    def load(self, part, **_):
        assert not any(part.ref is x for x in self.stored), "read before it is committed"
        return part[...]

    def arrive(self, barrier, arrive=plgpu.barrier_arrive):
        assert not self.stored, "told of before it is committed"
        arrive(barrier)


def run_scoped(body, accumulator):
    return body(Total(jnp.zeros(accumulator.shape, accumulator.dtype)))


def run_state(body):
    def run(accumulator):
        total = Total(accumulator._init)
        body(total)
        return total.value

    return run


class Transposed:
    def __init__(self, ref):
        self.ref = ref

    def __getitem__(self, index):
        return self.ref[...].T


def interpreted(**options):
    """In which kernels run in the simulator. Its names are public since jax 0.11."""
    if hasattr(plgpu, "InterpretGPUParams"):
        names = plgpu
    else:
        from jax._src.pallas.mosaic_gpu.interpret import params as names
    return names.force_gpu_interpret_mode(names.InterpretGPUParams(**options))


@contextlib.contextmanager
def simulated():
    """Mosaic's simulator has barriers, copies and memories, and looks for races. It has no layouts,
    no transposed references, no accumulators that begin with a value and no memory of tensor cores:
    products are plain ones here, that memory is as any other, and arrays that share some of it have
    each their own. What lies beyond the end of an array is read as zeros, as it is on a GPU.
    """
    from jax._src.pallas.mosaic.interpret import thread_map
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory

    clean = gpu_callbacks._clean_up_shared_memory

    def clean_up(token):
        assert not gpu_callbacks.get_races().races_found
        return clean(token)

    memory = TensorMemory()
    stand_ins = {
        (callback, "io_callback_impl"): called,
        (gpu_callbacks, "jnp"): np,
        (thread_map, "_run_jaxpr"): run_jaxpr,
        (gpu_callbacks, "_clean_up_shared_memory"): clean_up,
        (pl, "run_scoped"): run_scoped,
        (pl, "run_state"): run_state,
        (plgpu, "wgmma"): multiply,
        (plgpu, "TMEM"): lambda shape, dtype, **_: plgpu.SMEM(shape, dtype),
        (plgpu, "RefUnion"): lambda *refs: refs,
        (plgpu, "tcgen05_mma"): multiply_to_memory,
        (plgpu, "tcgen05_commit_arrive"): plgpu.barrier_arrive,
        (plgpu, "barrier_arrive"): memory.arrive,
        (plgpu, "async_load_tmem"): memory.load,
        (plgpu, "async_store_tmem"): memory.store,
        (plgpu, "wait_load_tmem"): lambda: None,
        (plgpu, "commit_tmem"): memory.commit,
        (jax_versions, "load"): load,
        (plgpu, "layout_cast"): lambda x, layout: x,
        (jax_versions, "transposed"): Transposed,
        (plgpu, "broadcasted_iota"): lambda dtype, shape, axis, **_: lax.broadcasted_iota(
            dtype, shape, axis
        ),
    }
    if hasattr(shared_memory, "_to_int"):  # since jax 0.11; takes JAX's arrays alone
        stand_ins[shared_memory, "_to_int"] = integer
    with contextlib.ExitStack() as stack:
        for (module, name), stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(module, name, stand_in))
        stack.enter_context(
            interpreted(
                detect_races=True, out_of_bounds_reads="uninitialized", uninitialized_memory="zero"
            )
        )
        yield
