"""What may carry out each operation, and why one is chosen and the others are not.

A table, first choice first: what is built later is a row more. `kernels/README.md` is the inventory
of the kernels that are in the package.
"""

from __future__ import annotations

import dataclasses

from longlive_jax.gpus import ARCHITECTURES


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way of carrying out an operation."""

    op: str
    name: str
    architectures: tuple[str, ...] = ()  # that it needs; none: it runs everywhere
    built: bool = True
    trusted: bool = True  # run on a device or simulated; else compiled only, and never a default

    def why_not(self, platform: str | None, architecture: str | None) -> str:
        """The reason that keeps it from running there; empty if none does."""
        if not self.built:
            return "planned, not built yet"
        if platform is None:
            return "JAX does not start"
        if self.architectures and platform != "gpu":
            return f"needs a GPU of {', '.join(self.architectures)}"
        if self.architectures and architecture not in self.architectures:
            return f"needs {', '.join(self.architectures)}; this is {architecture}"
        return "" if self.trusted else "compiled only: never a default"


BACKENDS = (
    Backend("attention", "cudnn", ("sm_80", "sm_89", "sm_90", "sm_100", "sm_103"), built=False),
    Backend("attention", "mosaic_gpu", ("sm_90", "sm_100"), built=False),
    Backend("attention", "xla"),
    Backend("matrix products", "xla"),
    Backend("nvfp4 products", "cudnn", ("sm_100", "sm_103"), trusted=False),
    Backend("nvfp4 products", "reference"),
    Backend("KV cache", "xla"),
    Backend("VAE decode", "xla"),
    Backend("text encoder", "xla"),
)

# Number types, and what asks for them.
TYPES = {
    "float32": "the default on CPUs",
    "bf16": "the default on accelerators",
    "int8": "--precision int8, --kv int8",
    "fp8": "--precision fp8, --kv fp8",
    "nvfp4": "--precision nvfp4, --kv nvfp4",
}

EMULATED = "not in its tensor cores: products are emulated, memory is saved all the same"

# What the tests have done for each architecture. Nothing has been run on a device so far.
CHECKED = dict.fromkeys(ARCHITECTURES, "a matrix product compiled, not run") | dict.fromkeys(
    ("sm_90", "sm_100"), "1.3B and 5B programs compiled, not run"
)


def table(platform: str | None, architecture: str | None) -> list[dict[str, str]]:
    """One row per operation: what is chosen, and why not the others."""
    rows = []
    for op in dict.fromkeys(backend.op for backend in BACKENDS):
        reasons = {b.name: b.why_not(platform, architecture) for b in BACKENDS if b.op == op}
        chosen = next((name for name, reason in reasons.items() if not reason), "nothing")
        others = {name: why or "a later choice" for name, why in reasons.items() if name != chosen}
        why_not = "; ".join(f"{name}: {why}" for name, why in others.items())
        rows.append({"operation": op, "chosen": chosen, "why not the others": why_not})
    return rows


def precisions(platform: str | None, architecture: str | None) -> list[dict[str, str]]:
    """One row per number type: how models run in it here, and what the hardware could do."""
    known = ARCHITECTURES.get(architecture or "")
    rows = []
    for name, asked in TYPES.items():
        state = f"runs: {asked}" if platform else "JAX does not start"
        cores = "no tensor cores known" if known is None else EMULATED
        if known is not None and name in known.types:
            cores = "in its tensor cores"
        rows.append({"precision": name, "models": state, "hardware": cores})
    return rows


def support() -> list[dict[str, str]]:
    """One row per architecture."""
    return [
        {
            "architecture": arch.name,
            "what": arch.what,
            "CUDA": " or ".join(map(str, arch.cuda)),
            "tensor cores": ", ".join(arch.types),
            "checked": CHECKED[arch.name],
        }
        for arch in ARCHITECTURES.values()
    ]
