"""Trace and compile for a GPU that is not in this machine, by its description.

The compiler needs no more than the device that arrays are placed on. But long before it runs,
kernels ask which GPU the default device is, and JAX asks whether cuDNN is installed and supports a
call. They ask about the devices of the process, and no argument overrides that (jax 0.10 to 0.12,
tokamax 0.0.17). `target` does, by replacing the functions that are asked. Two of them are private
names of JAX, and this is the only module that uses any.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.extend import backend

CUDNN = 91300  # 9.13: the version reported to JAX
CUDNN_MODULE = "jax._src.cudnn.fused_attention_stablehlo"

# A part of the key of JAX's caches: what was traced for another device is traced again.
_TARGET = jax.make_user_context(None)
_ONE_AT_A_TIME = threading.RLock()


@dataclasses.dataclass(frozen=True)
class Kind:
    """A GPU of which only the architecture is known: enough to trace for, not to compile for."""

    compute_capability: str  # such as "9.0"


def devices(name: str, description: str, count: int = 1) -> Sequence[jax.Device]:
    """Return GPUs as the compiler sees them, to place abstract arrays on.

    Args:
      name: of the GPU, for messages of the compiler.
      description: XLA's, a `stream_executor.GpuTargetConfigProto` as text.
      count: how many there are, in one machine.
    """
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=name,
        target_config=description,
        topology=f"1x{count}x1",
    ).devices


@contextlib.contextmanager
def target(device: jax.Device | Kind) -> Iterator[None]:
    """Make `device` the default device, with cuDNN, for what this thread traces and compiles.

    Operations outside of `jax.jit` still run on the devices of the process. Other threads are not
    affected, but for a target of their own they wait until this one is left.

    Raises:
      NotImplementedError: this version of JAX lacks the function that kernels ask for the default
        device.

    Warns:
      UserWarning: this version of JAX lacks the functions by which it asks about cuDNN, so that
        cuDNN's attention cannot be compiled. All else can.
    """
    with _ONE_AT_A_TIME, contextlib.ExitStack() as stack:
        for module, name, replacement in _replacements():
            stack.enter_context(_replaced(module, name, replacement))
        stack.enter_context(_TARGET(device))
        yield


def _replacements() -> list[tuple[Any, str, Callable]]:
    """Modules, names in them, and what answers in their place."""
    if not hasattr(backend, "get_default_device"):
        raise NotImplementedError(
            f"jax {jax.__version__} cannot trace kernels for a GPU that is absent: "
            "jax.extend.backend has no get_default_device"
        )
    found = [(backend, "get_default_device", _default_device(backend.get_default_device))]
    asked = {"check_cudnn_version": _cudnn_version, "check_compute_capability": _has_capability}
    try:
        module = importlib.import_module(CUDNN_MODULE)
    except ModuleNotFoundError:
        module = None
    missing = [name for name in asked if not hasattr(module, name)]
    if not missing:
        return found + [(module, name, make(getattr(module, name))) for name, make in asked.items()]
    warnings.warn(
        f"jax {jax.__version__} cannot compile cuDNN's attention for a GPU that is absent: "
        f"{CUDNN_MODULE} has no {' and no '.join(missing)}; choose another implementation",
        stacklevel=4,  # of whoever enters `target`
    )
    return found


@contextlib.contextmanager
def _replaced(module: Any, name: str, replacement: Callable) -> Iterator[None]:
    real = getattr(module, name)
    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, real)


def _default_device(real: Callable[[], Any]) -> Callable[[], Any]:
    def get_default_device() -> Any:
        return real() if _TARGET.value is None else _TARGET.value

    return get_default_device


def _cudnn_version(real: Callable[[], int]) -> Callable[[], int]:
    def check_cudnn_version() -> int:
        return real() if _TARGET.value is None else CUDNN

    return check_cudnn_version


def _has_capability(real: Callable[[str], bool]) -> Callable[[str], bool]:
    def check_compute_capability(capability: str) -> bool:
        if _TARGET.value is None:
            return real(capability)
        return _numbers(_TARGET.value.compute_capability) >= _numbers(capability)

    return check_compute_capability


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(x) for x in capability.split("."))
