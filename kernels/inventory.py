"""The kernels of this package, as tables: README.md shows them, `longlive doctor` reads them.

Nothing here imports JAX.
"""

from __future__ import annotations

import dataclasses

RUN, SIMULATED, COMPILED = "run on device", "simulated", "compiled only"
FP4 = ("sm_100", "sm_103", "sm_120")  # with units that multiply four-bit floats


@dataclasses.dataclass(frozen=True)
class Entry:
    """One backend on one kind of hardware. state: RUN, SIMULATED (checked in an interpreter on the
    CPU) or COMPILED. architectures: of the GPUs that it is for; none: all, or the CPU. product: of
    two quantised matrices ("W4A4"), or of one ("W4A16"); both where it is empty. toolkit: beneath
    it. but: what the state does not hold of.
    """

    op: str
    backend: str
    hardware: str
    state: str
    architectures: tuple[str, ...] = ()
    product: str = ""
    toolkit: str = ""
    but: str = ""

    @property
    def plain(self) -> bool:
        """Whether it is no more than `jnp`, and may be the default where it has not been run."""
        return self.backend in ("reference", "xla")

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Its line in README.md: op, backend, hardware, state."""
        op = f"`{self.op}`, {self.product}" if self.product else f"`{self.op}`"
        backend = f"`{self.backend}` ({self.toolkit})" if self.toolkit else f"`{self.backend}`"
        return op, backend, self.hardware, f"{self.state}, {self.but}" if self.but else self.state


_CHUNKS, _WINDOW = "attention/chunk_table", "attention/sink_window"
_PRODUCTS = "but for the products themselves"
_MEMORY = "but for the products and the tensor cores' memory"
_GRAPH = "but for what cuDNN makes of it"
_HOPPER, _BLACKWELL = ("sm_90",), FP4[:2]
_AMPERE = "NVIDIA, sm_80 and later (compiled for H100, B200)"

ATTENTION = (
    Entry(_CHUNKS, "xla", "CPU", RUN),
    Entry(_CHUNKS, "xla", "NVIDIA H100, B200", COMPILED),
    Entry(_CHUNKS, "mosaic", "NVIDIA H100", SIMULATED, _HOPPER, "", "Mosaic GPU", _PRODUCTS),
    Entry(_CHUNKS, "mosaic", "NVIDIA B200", SIMULATED, _BLACKWELL, "", "tcgen05", _MEMORY),
    Entry(_WINDOW, "xla", "CPU", RUN),
    Entry(_WINDOW, "xla", "NVIDIA H100, B200", COMPILED),
    Entry(_WINDOW, "mosaic", "NVIDIA H100", SIMULATED, _HOPPER, "", "Mosaic GPU", _PRODUCTS),
    Entry(_WINDOW, "mosaic", "NVIDIA B200", SIMULATED, _BLACKWELL, "", "tcgen05", _MEMORY),
    Entry(_WINDOW, "tokamax", "NVIDIA H100, B200", COMPILED, _HOPPER + _BLACKWELL),
    Entry(_WINDOW, "cudnn", _AMPERE, COMPILED, ("sm_80", "sm_89", "sm_90", *FP4), but=_GRAPH),
)

_QUANTIZE, _MATMUL = "nvfp4/quantize", "nvfp4/matmul"
_QUANTIZER = "NVIDIA, sm_89 and later (compiled for H100, B200)"
_FP4 = "NVIDIA B200, B300, RTX PRO 6000"

LOW_BIT = (
    Entry(_QUANTIZE, "reference", "CPU", RUN),
    Entry(_QUANTIZE, "triton", _QUANTIZER, SIMULATED, ("sm_89", "sm_90", *FP4)),
    Entry(_MATMUL, "reference", "CPU", RUN),
    Entry(_MATMUL, "xla", "CPU", RUN),
    Entry(_MATMUL, "xla", "NVIDIA, sm_80 and later", COMPILED),
    Entry(
        _MATMUL,
        "wgmma",
        "NVIDIA H100",
        SIMULATED,
        ("sm_90",),
        "W4A16",
        "Mosaic GPU",
        "shared memory in the place of registers",
    ),
    Entry(_MATMUL, "triton", _FP4, SIMULATED, FP4, "W4A4", but="but for the product itself"),
    Entry(_MATMUL, "mosaic", "NVIDIA B200, B300", COMPILED, _BLACKWELL, "W4A4", "tcgen05"),
    Entry(_MATMUL, "cudnn", _FP4, COMPILED, FP4, "W4A4"),
)
