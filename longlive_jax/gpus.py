"""The GPUs that plans are made for and what each architecture supports, as tables.

`GPU.describe` is the text by which XLA's compiler knows a GPU that is not there.
"""

from __future__ import annotations

import dataclasses

from longlive_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A compute capability: shared memory and threads per multiprocessor, and the number types of
    its tensor cores.
    """

    major: int
    minor: int
    what: str
    shared: int  # bytes per multiprocessor
    threads: int  # resident per multiprocessor
    types: tuple[str, ...]  # that its tensor cores multiply
    cuda: tuple[int, ...] = (13, 12)  # major CUDA versions whose jax plugin has code for it

    @property
    def name(self) -> str:
        return f"sm_{self.major}{self.minor}"


_AMPERE = ("bf16", "int8")
_ADA = (*_AMPERE, "fp8")
_BLACKWELL = (*_ADA, "nvfp4")

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(8, 0, "Ampere: A100", 167_936, 2048, _AMPERE),
        Architecture(8, 9, "Ada: RTX 4090, L40S", 102_400, 1536, _ADA),
        Architecture(9, 0, "Hopper: H100, H200", 233_472, 2048, _ADA),
        Architecture(10, 0, "Blackwell: B200, GB200", 233_472, 2048, _BLACKWELL),
        Architecture(10, 3, "Blackwell Ultra: B300, GB300", 233_472, 2048, _BLACKWELL, (13,)),
        Architecture(12, 0, "Blackwell: RTX 5090, RTX PRO 6000", 102_400, 1536, _BLACKWELL),
    )
}


@dataclasses.dataclass(frozen=True)
class GPU:
    """One product. Memory is what its driver reports, all of it."""

    name: str
    title: str
    architecture: str
    memory: int  # bytes
    cores: int  # multiprocessors
    l2: int  # bytes
    bandwidth: int  # bytes a second
    clock_ghz: float

    def describe(self) -> str:
        """XLA's description of it (`stream_executor.GpuTargetConfigProto`, as text)."""
        arch = ARCHITECTURES[self.architecture]
        feature = " feature_extension: ACCELERATED_FEATURES" if arch.major >= 9 else ""
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {arch.shared}
  shared_memory_per_block_optin: {arch.shared - 1024}
  threads_per_core_limit: {arch.threads} core_count: {self.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2} clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {arch.major} minor: {arch.minor}{feature} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "{self.title}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{self.title}"
"""


def _mib(count: int) -> int:
    return count * 2**20


# In the order in which a larger one is suggested.
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("rtx4090", "NVIDIA GeForce RTX 4090", "sm_89", _mib(24_564), 128, _mib(72),
            1008 * 10**9, 2.52),
        GPU("rtx5090", "NVIDIA GeForce RTX 5090", "sm_120", _mib(32_607), 170, _mib(96),
            1792 * 10**9, 2.41),
        GPU("l40s", "NVIDIA L40S", "sm_89", _mib(46_068), 142, _mib(96), 864 * 10**9, 2.52),
        GPU("a100", "NVIDIA A100-SXM4-80GB", "sm_80", _mib(81_920), 108, _mib(40),
            2039 * 10**9, 1.41),
        GPU("h100", "NVIDIA H100 80GB HBM3", "sm_90", 84_942_979_072, 132, _mib(50),
            3352 * 10**9, 1.98),
        GPU("rtx6000pro", "NVIDIA RTX PRO 6000", "sm_120", 100_000_000_000, 188, _mib(128),
            1792 * 10**9, 2.6),
        GPU("h200", "NVIDIA H200", "sm_90", _mib(143_771), 132, _mib(50), 4800 * 10**9, 1.98),
        GPU("b200", "NVIDIA B200", "sm_100", 191_514_411_008, 148, 132_644_864,
            7672 * 10**9, 1.965),
        GPU("b300", "NVIDIA B300", "sm_103", _mib(275_040), 148, 132_644_864,
            7672 * 10**9, 1.92),
    )
}  # fmt: skip


# Dense bfloat16 products, FLOP/s, as NVIDIA's data sheets have them.
PEAKS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 5090": 209e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Of a device by JAX's name of it; None where it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device_kind), None)


def find(name: str) -> GPU:
    """The GPU of that name.

    Raises:
      InputError: there is none in the table.
    """
    if name not in GPUS:
        raise InputError(f'--gpu "{name}" is not known: say {", ".join(GPUS)}')
    return GPUS[name]
