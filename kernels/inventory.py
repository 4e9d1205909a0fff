"""The kernels of this package, as tables: README.md shows them, `longlive doctor` reads them.

Nothing here imports JAX.
"""

from __future__ import annotations

import dataclasses

RUN, SIMULATED, COMPILED = "run on device", "simulated", "compiled only"
FP4 = ("sm_100", "sm_103", "sm_120")  # with units that multiply four-bit floats


@dataclasses.dataclass(frozen=True)
class Entry:
    """One backend on one kind of hardware.

    Attributes:
      op: The op, a folder of this package.
      backend: Its name in the op's `BACKENDS`.
      hardware: What it runs on, in words.
      state: RUN, SIMULATED (checked in an interpreter on the CPU) or COMPILED.
      architectures: Of the GPUs that it is for; none: all, or the CPU.
      calls: Which calls of the op it takes; empty: all. Matmuls of two quantised matrices are
        "W4A4", those of one "W4A16"; "full tables" are those in which every query sees every key.
      toolkit: What it is written in.
      but: What the state does not hold of.
      opt_in: Runs only when asked for by name; others are defaults where they support a call.
    """

    op: str
    backend: str
    hardware: str
    state: str
    architectures: tuple[str, ...] = ()
    calls: str = ""
    toolkit: str = ""
    but: str = ""
    opt_in: bool = False

    @property
    def checked(self) -> str:
        """The state, and what it does not hold of."""
        return f"{self.state}, {self.but}" if self.but else self.state

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Its line in README.md: op, backend, hardware, state."""
        op = f"`{self.op}`, {self.calls}" if self.calls else f"`{self.op}`"
        backend = f"`{self.backend}` ({self.toolkit})" if self.toolkit else f"`{self.backend}`"
        state = f"{self.checked}; opt-in" if self.opt_in else self.checked
        return op, backend, self.hardware, state


CHUNKS, WINDOW = "attention/chunk_table", "attention/sink_window"
FULL = "full tables"
_PRODUCTS = "but for the products themselves"
_MEMORY = "but for the products and the tensor cores' memory"
_GRAPH = "but for what cuDNN makes of it"
_HOPPER, _BLACKWELL = ("sm_90",), FP4[:2]
_SINCE_AMPERE = ("sm_80", "sm_89", "sm_90", *FP4)
_AMPERE = "NVIDIA, sm_80 and later (compiled for H100, B200)"


def _mosaic(op: str, gpu: str, architectures: tuple[str, ...], toolkit: str, but: str) -> Entry:
    return Entry(op, "mosaic", gpu, SIMULATED, architectures, "", toolkit, but, opt_in=True)


ATTENTION = (
    Entry(CHUNKS, "cudnn", _AMPERE, COMPILED, _SINCE_AMPERE, FULL, but=_GRAPH),
    Entry(CHUNKS, "xla", "CPU", RUN),
    Entry(CHUNKS, "xla", "NVIDIA H100, B200", COMPILED),
    _mosaic(CHUNKS, "NVIDIA H100", _HOPPER, "Mosaic GPU", _PRODUCTS),
    _mosaic(CHUNKS, "NVIDIA B200", _BLACKWELL, "tcgen05", _MEMORY),
    Entry(WINDOW, "cudnn", _AMPERE, COMPILED, _SINCE_AMPERE, but=_GRAPH),
    Entry(WINDOW, "xla", "CPU", RUN),
    Entry(WINDOW, "xla", "NVIDIA H100, B200", COMPILED),
    _mosaic(WINDOW, "NVIDIA H100", _HOPPER, "Mosaic GPU", _PRODUCTS),
    _mosaic(WINDOW, "NVIDIA B200", _BLACKWELL, "tcgen05", _MEMORY),
    Entry(WINDOW, "tokamax", "NVIDIA H100, B200", COMPILED, _HOPPER + _BLACKWELL, opt_in=True),
)

_QUANTIZE, _MATMUL = "nvfp4/quantize", "nvfp4/matmul"
_QUANTIZER = "NVIDIA, sm_89 and later (compiled for H100, B200)"
_FP4 = "NVIDIA B200, B300, RTX PRO 6000"
_REGISTERS = "shared memory in the place of registers"
_PRODUCT = "but for the product itself"

LOW_BIT = (
    Entry(_QUANTIZE, "reference", "CPU", RUN),
    Entry(_QUANTIZE, "triton", _QUANTIZER, SIMULATED, _SINCE_AMPERE[1:], opt_in=True),
    Entry(_MATMUL, "reference", "CPU", RUN),
    Entry(_MATMUL, "xla", "CPU", RUN),
    Entry(_MATMUL, "xla", "NVIDIA, sm_80 and later", COMPILED),
    Entry(
        op=_MATMUL,
        backend="wgmma",
        hardware="NVIDIA H100",
        state=SIMULATED,
        architectures=_HOPPER,
        calls="W4A16",
        toolkit="Mosaic GPU",
        but=_REGISTERS,
        opt_in=True,
    ),
    Entry(_MATMUL, "triton", _FP4, SIMULATED, FP4, "W4A4", but=_PRODUCT, opt_in=True),
    Entry(
        op=_MATMUL,
        backend="mosaic",
        hardware="NVIDIA B200, B300",
        state=COMPILED,
        architectures=_BLACKWELL,
        calls="W4A4",
        toolkit="tcgen05",
        opt_in=True,
    ),
    Entry(_MATMUL, "cudnn", _FP4, COMPILED, FP4, "W4A4", opt_in=True),
)
