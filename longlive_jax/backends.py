"""What may carry out each operation, and why one is chosen and the others are not; what runs in
fewer bits, on which architecture and how.

Tables, first choice first. Those of kernels are `longlive_kernels.inventory`, which
`kernels/README.md` shows.
"""

from __future__ import annotations

import dataclasses

from longlive_kernels import inventory

from longlive_jax.gpus import ARCHITECTURES, Architecture


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way of carrying out an operation.

    Attributes:
      op: The operation.
      name: Of the backend.
      architectures: That it needs; none: it runs everywhere.
      opt_in: How far it has been checked, where it runs only when asked for by name.
    """

    op: str
    name: str
    architectures: tuple[str, ...] = ()
    opt_in: str = ""

    def why_not(self, platform: str | None, architecture: str | None) -> str:
        """The reason that keeps it from running there unasked; empty if none does."""
        if platform is None:
            return "JAX does not start"
        if self.architectures and platform != "gpu":
            return f"needs a GPU of {', '.join(self.architectures)}"
        if self.architectures and architecture not in self.architectures:
            return f"needs {', '.join(self.architectures)}; this is {architecture}"
        return self.opt_in and f"opt-in: {self.opt_in}"


# Attention of streams; of training; of prompts and bidirectional models.
ATTENTION = (
    (inventory.WINDOW, ""),
    (inventory.CHUNKS, ""),
    (inventory.CHUNKS, inventory.FULL),
)


def _attention(op: str, calls: str) -> tuple[Backend, ...]:
    """The backends of an op that take such calls, the default first, each name once."""
    named: dict[str, list[inventory.Entry]] = {}
    for entry in inventory.ATTENTION:
        if entry.op == op and entry.calls in ("", calls):
            named.setdefault(entry.backend, []).append(entry)
    return tuple(
        Backend(
            op=f"{op}, {calls}" if calls else op,
            name=name,
            architectures=tuple(a for entry in entries for a in entry.architectures),
            opt_in=entries[0].state if entries[0].opt_in else "",
        )
        for name, entries in named.items()
    )


PRODUCTS = ("W4A4", "W4A16")  # of two four-bit matrices, and of one with numbers as they are


def _products(product: str) -> tuple[Backend, ...]:
    """The backends of an NVFP4 matmul; what needs hardware first."""
    entries = [e for e in inventory.LOW_BIT if e.op == "nvfp4/matmul" and e.calls == product]
    kernels = (
        Backend(f"nvfp4 {product}, bf16", e.backend, e.architectures, e.state) for e in entries
    )
    plain = (Backend(f"nvfp4 {product}, bf16", name) for name in ("xla", "reference"))
    return (*kernels, *plain)


BACKENDS = (
    *(backend for op, calls in ATTENTION for backend in _attention(op, calls)),
    Backend("matrix products", "xla"),
    *(backend for product in PRODUCTS for backend in _products(product)),
    Backend("KV cache", "xla"),
    Backend("VAE decode", "xla"),
    Backend("text encoder", "xla"),
)


def names(op: str) -> tuple[str, ...]:
    """Of the backends of an operation."""
    return tuple(backend.name for backend in BACKENDS if backend.op == op)


# Number types, and what asks for them.
TYPES = {
    "float32": "the default on CPUs",
    "bf16": "the default on accelerators",
    "int8": "--precision int8, --kv int8",
    "fp8": "--precision fp8, --kv fp8",
    "nvfp4": "--precision nvfp4, --kv nvfp4",
}

EMULATED = "not in its tensor cores: products are emulated, memory is saved all the same"

_SAVES = (
    "operands are quantised, unpacked and multiplied in bfloat16, which saves memory but no time;"
    " --weights_only multiplies what comes in as it is"
)


def emulation(platform: str, architecture: str | None) -> str:
    """What whoever multiplies two four-bit matrices on a GPU should know; empty on CPUs, where
    nobody expects another thing.
    """
    if platform != "gpu":
        return ""
    here = architecture or "this GPU"
    if not _units(architecture, "nvfp4"):
        return f"nvfp4 products are emulated on {here}, which has no FP4 units: {_SAVES}"
    return f"nvfp4 products are emulated on {here}, whose FP4 units no default uses yet: {_SAVES}"


def _units(architecture: str | None, kind: str) -> bool:
    known = ARCHITECTURES.get(architecture or "")
    return known is not None and kind in known.types


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


def low_bits() -> list[dict[str, str]]:
    """One row per architecture, and one of CPUs: how what is kept in fewer bits runs there. Where
    kernels have to be asked for, what runs without being asked stands first.
    """
    cpu = {
        "on": "CPU",
        **{product: _default(product, None) for product in PRODUCTS},
        **dict.fromkeys(("fp8 products", "int8 products"), f"emulated, {inventory.RUN}"),
        "KV cache": _CACHE.format(inventory.RUN),
    }
    return [cpu, *(_low_bits(arch) for arch in ARCHITECTURES.values())]


_CACHE = "kept, attended unpacked, {}"


def _low_bits(arch: Architecture) -> dict[str, str]:
    row = {"on": f"{arch.name} ({arch.what.split(':')[0]})"}
    for product in PRODUCTS:
        entries = [e for e in inventory.LOW_BIT if e.calls == product]
        named = [f"{e.backend} {e.checked}" for e in entries if arch.name in e.architectures]
        asked = f"by name: {', '.join(named)}" if named else ""
        if product == "W4A4" and "nvfp4" not in arch.types:
            asked = "units refused: it has none"
        row[product] = "; ".join(filter(None, (_default(product, arch), asked)))
    for kind in ("fp8", "int8"):
        how = "in its units" if kind in arch.types else "emulated"
        row[f"{kind} products"] = f"{how}, {inventory.COMPILED}"
    return row | {"KV cache": _CACHE.format(inventory.COMPILED)}


def _default(product: str, arch: Architecture | None) -> str:
    """Of what runs without being asked for: XLA's own product of unpacked matrices."""
    state = inventory.RUN if arch is None else inventory.COMPILED
    return f"emulated (xla), {state}" if product == "W4A4" else f"unpacked (xla), {state}"
