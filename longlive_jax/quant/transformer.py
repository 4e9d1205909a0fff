"""Which matrices of a transformer are kept in fewer bits."""

from __future__ import annotations

import fnmatch
import warnings

import jax
from longlive_kernels import arch

from longlive_jax import backends, weights
from longlive_jax.config import Precision
from longlive_jax.convert.lora import LINEARS
from longlive_jax.dit.model import DiT
from longlive_jax.errors import EmulationWarning, InputError
from longlive_jax.lora import Changed, LowRank
from longlive_jax.quant import kernels

SUFFIX = ".kernel"
KEPT = "bf16"  # the kind that leaves a matrix as it is


def kinds(how: Precision) -> dict[str, str]:
    """The kind of every linear layer that is not kept as it is: of its patterns the first that
    fits decides.

    Raises InputError for a pattern that fits no layer.
    """
    found = {}
    for pattern, _ in how.layers:
        if not fnmatch.filter(LINEARS, pattern):
            raise InputError(f'no linear layer is called "{pattern}"')
    for path in LINEARS:
        kind = next((kind for p, kind in how.layers if fnmatch.fnmatch(path, p)), KEPT)
        if kind != KEPT:
            found[path] = kind
    return found


def check(shapes: dict[str, tuple[int, ...]], how: Precision) -> None:
    """Raises InputError where a kernel of these shapes, by path, cannot be kept so."""
    for path, kind in kinds(how).items():
        *_, inputs, outputs = shapes[path + SUFFIX]
        if kind == "nvfp4" and (inputs % 16 or outputs % how.tile):
            raise InputError(
                f"{path} is {inputs} x {outputs}: nvfp4 needs multiples of 16 x {how.tile}"
            )


def quantize(dit: DiT, how: Precision) -> DiT:
    """`dit` with kernels in fewer bits. A LoRA beside them stays as it is. Works on shapes too, in
    `jax.eval_shape`.

    Raises InputError where that cannot be done, or has been.
    """
    flat = weights.flatten(dit)
    check({path: leaf.shape for path, leaf in flat.items()}, how)
    for path, kind in kinds(how).items():
        flat[path + SUFFIX] = _made(flat[path + SUFFIX], kind, how)
    return weights.unflatten(dit, flat)


def tell(how: Precision) -> None:
    """Warns where a GPU has no units for products of two four-bit matrices, or nothing that uses
    them by default: once, as Python shows a warning once.
    """
    if "nvfp4" in kinds(how).values() and not how.weights_only:
        said = backends.emulation(*here())
        if said:
            warnings.warn(said, EmulationWarning, stacklevel=1)


def here() -> tuple[str, str | None]:
    """Platform and architecture of where programs run unless told otherwise."""
    device = jax.devices()[0]
    number = arch.of(device)
    return device.platform, number and f"sm_{number}"


def _made(leaf, kind: str, how: Precision):
    if isinstance(leaf, kernels.Kernel):
        raise InputError(
            "this model's matrices are in fewer bits already; to multiply what comes in as it is,"
            " load it so (--weights_only alone)"
        )
    if isinstance(leaf, LowRank):
        return LowRank(kernels.make(leaf.kernel, kind, how), leaf.a, leaf.b, leaf.scale)
    if isinstance(leaf, Changed):
        return Changed(*(kernels.make(x, kind, how) for x in (leaf.bare, leaf.value)))
    return kernels.make(leaf, kind, how)
