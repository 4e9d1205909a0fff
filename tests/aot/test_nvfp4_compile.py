"""NVFP4 kernels compiled for GPUs that are not there: what the programs are made of.

Needs the [aot] extra, and Triton of it for Triton's. Shapes are the widest layers of the models.
"""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from longlive_kernels import arch
from longlive_kernels.nvfp4 import NVFP4, RULES
from longlive_kernels.nvfp4.format import BLOCK
from longlive_kernels.nvfp4.matmul import cudnn, mosaic, wgmma
from longlive_kernels.nvfp4.matmul import triton as triton_matmul
from longlive_kernels.nvfp4.matmul.shapes import SHAPES
from longlive_kernels.nvfp4.quantize import triton as triton_quantize

pytestmark = pytest.mark.aot

PROGRAM = pathlib.Path(__file__).with_name("mosaic_program.py")
FOUR_BITS = {"cudnn": cudnn, "triton": triton_matmul, "mosaic": mosaic}
REAL = ["5b_up", "1.3b_up"]
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def array(shape, dtype, sharding):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def nvfp4(shape, sharding) -> NVFP4:
    *stack, rows, columns = shape
    return NVFP4(
        array((*stack, rows, columns // 2), jnp.uint8, sharding),
        array((*stack, rows, columns // BLOCK), jnp.float8_e4m3fn, sharding),
        array(tuple(stack), jnp.float32, sharding),
        "mse",
    )


def operands(name: str, sharding) -> tuple[NVFP4, NVFP4]:
    shape = SHAPES[name]
    return nvfp4(shape.a, sharding), nvfp4(shape.b, sharding)


def compiled(function, *args, **options):
    return jax.jit(functools.partial(function, **options)).lower(*args).compile()


def check(assembled: str, *, registers: int):
    """Nothing is spilled, and no more registers are used than so many."""
    (spills,) = SPILLS.findall(assembled)
    assert spills == ("0", "0")
    (used,) = REGISTERS.findall(assembled)
    assert int(used) <= registers


def mosaic_program(gpu: str, backend: str, name: str) -> tuple[int, str]:
    """The exit status of compiling a kernel of Mosaic, and its PTX and what ptxas says of it."""
    pytest.importorskip(
        "jax_plugins.xla_cuda13", reason="needs the [aot] extra", exc_type=ImportError
    )
    dumps = {f"MOSAIC_GPU_DUMP_{kind}": "1" for kind in ("PTX", "PTXAS")}
    done = subprocess.run(
        [sys.executable, PROGRAM, gpu, backend, name],
        env=os.environ | dumps,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


@pytest.fixture
def assembled(monkeypatch, tmp_path):
    """`assembled(function, *args)`: compiles, and returns the PTX of its Triton kernel, its shared
    memory, and what ptxas says of it.
    """
    pytest.importorskip("triton", reason="needs Triton of the [aot] extra")
    pytest.importorskip("jax_triton", reason="needs jax_triton of the [aot] extra")
    import triton
    from jax_triton import triton_lib
    from longlive_kernels.nvfp4.matmul import dot_scaled
    from longlive_kernels.nvfp4.quantize import fused
    from triton.backends.nvidia.compiler import get_ptxas

    seen = []
    real = triton_lib.triton_kernel_call_lib.TritonKernel

    def kernel(name, warps, blocks, shared, ptx, *rest):
        seen.append((ptx, shared))
        return real(name, warps, blocks, shared, ptx, *rest)

    monkeypatch.setattr(triton_lib.triton_kernel_call_lib, "TritonKernel", kernel)
    # New functions of the same text: jax_triton keeps what it has compiled of a function.
    for module, name in ((dot_scaled, "product"), (fused, "quantized")):
        monkeypatch.setattr(module, name, triton.jit(getattr(module, name).fn))

    def run(sm: int, function, *args, **options) -> tuple[str, int, str]:
        seen.clear()
        assert "triton_kernel_call" in compiled(function, *args, sm=sm, **options).as_text()
        ((ptx, shared),) = seen
        ptx = ptx.decode() if isinstance(ptx, bytes) else ptx
        (tmp_path / "kernel.ptx").write_text(ptx)
        (target,) = re.findall(r"\.target (\w+)", ptx)
        command = [get_ptxas(sm).path, "-v", f"-arch={target}", tmp_path / "kernel.ptx"]
        command += ["-o", tmp_path / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        return ptx, shared, said.stderr

    return run


@pytest.mark.parametrize(("gpu", "number"), [("h100", 90), ("b200", 100), ("rtx6000pro", 120)])
def test_an_architecture_is_read_off_a_description(gpus, gpu, number):
    (device,) = gpus(gpu)
    assert arch.of(device) == number


@pytest.mark.parametrize("name", REAL)
def test_cudnn_multiplies_four_bits_on_blackwell(device, name):
    a, b = operands(name, device("b200"))
    assert cudnn.unsupported(a, b, jnp.bfloat16, sm=100) is None
    program = compiled(cudnn.matmul, a, b, dtype=jnp.bfloat16)
    assert "__cudnn$blockScaledDot" in program.as_text()
    # Values are not copied. What is added are scales and the sums; twice, where XLA fills up rows.
    shape = SHAPES[name]
    sums = 4 * shape.m * shape.n * (2 if shape.m % 128 else 1)
    assert program.memory_analysis().temp_size_in_bytes < sums + 8e6


def test_on_hopper_the_same_call_would_multiply_copies(device):
    """Which is why it is refused there."""
    a, b = operands("1.3b_up", device("h100"))
    program = compiled(cudnn.matmul, a, b, dtype=jnp.bfloat16)
    assert "__cudnn$blockScaledDot" not in program.as_text()


@pytest.mark.parametrize("name", FOUR_BITS)
def test_four_bits_are_refused_on_hopper(gpus, device, name):
    (hopper,) = gpus("h100")
    reason = FOUR_BITS[name].unsupported(
        *operands("5b_up", device("h100")), jnp.bfloat16, sm=arch.of(hopper)
    )
    assert "no FP4 units" in reason and "matmul_w4a16" in reason


@pytest.mark.parametrize("name", REAL)
def test_mosaic_multiplies_four_bits_on_blackwell(name):
    status, text = mosaic_program("b200", "mosaic", name)
    assert status == 0
    assert re.search(r"tcgen05\.mma\S*kind::mxf4nvf4\S*block_scale", text)
    check(text, registers=128)


def test_a_kernel_for_blackwell_does_not_compile_for_hopper():
    status, text = mosaic_program("h100", "mosaic", "1.3b_up")
    assert status != 0
    # Of the first, of jax 0.10: by Mosaic; later by LLVM.
    assert re.search(r"tcgen05\S* op is not supported on sm_90|Cannot select: \S+ \S+tcgen05", text)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(
    ("gpu", "sm", "instruction", "memory"),
    [("b200", 100, "tcgen05.mma", 227), ("rtx6000pro", 120, "mma.sync", 99)],
)
def test_triton_multiplies_four_bits(device, assembled, gpu, sm, instruction, memory, name):
    a, b = operands(name, device(gpu))
    assert triton_matmul.unsupported(a, b, jnp.bfloat16, sm=sm) is None
    ptx, shared, said = assembled(sm, triton_matmul.matmul, a, b, dtype=jnp.bfloat16)
    assert re.search(re.escape(instruction) + r"\S*kind::mxf4nvf4\S*block_scale", ptx)
    check(said, registers=255)
    assert shared <= memory * 1024


@pytest.mark.parametrize("name", REAL)
def test_wgmma_unpacks_weights_on_hopper(name):
    shape = SHAPES[name]
    status, text = mosaic_program("h100", "wgmma", name)
    assert status == 0
    rows = wgmma.tile_rows(shape.m)
    assert f"wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.bf16.bf16" in text
    check(text, registers=168)  # what 384 threads may have
    # Of weights there are copies with 5 bits for each, none that is unpacked.
    (temporary,) = re.findall(r"^temporary (\d+)$", text, re.MULTILINE)
    assert int(temporary) < 5.1 / 8 * shape.n * shape.k


@pytest.mark.parametrize("gpu", ["h100", "b200"])
@pytest.mark.parametrize(
    ("rule", "tile", "noise", "registers"),
    [
        ("static_6", 1, "none", 64),
        ("mse", 1, "none", 128),
        ("mse", 1, "draws", 168),
        ("mse", 1, "seed", 168),
        ("static_4", 16, "none", 64),
        ("mae", 16, "none", 128),
        ("abs_max", 16, "seed", 168),
    ],
)
def test_triton_quantises(device, assembled, gpu, rule, tile, noise, registers):
    sharding, shape = device(gpu), SHAPES["5b_up"].a
    sm = {"h100": 90, "b200": 100}[gpu]
    x, amax = array(shape, jnp.bfloat16, sharding), array((), jnp.float32, sharding)
    assert triton_quantize.unsupported(x, sm=sm) is None
    given = {
        "draws": array((RULES[rule].candidates, *shape), jnp.float32, sharding),
        "seed": array((), jnp.int32, sharding),
    }
    given = [given[noise]] if noise in given else []

    def quantize(x, amax, *noisy, sm):
        options = {"draws": None} | dict(zip([noise], noisy, strict=False))
        options |= dict(rule=rule, tile=tile, transpose=False, signs=None)
        return triton_quantize.quantize(x, amax=amax, sm=sm, **options)

    ptx, _, said = assembled(sm, quantize, x, amax, *given)
    check(said, registers=registers)
    # What decides bytes: every product and sum is rounded, and so are divisions and scales.
    assert "div.rn.f32" in ptx and "cvt.rn.satfinite.e4m3x2.f32" in ptx
    assert not re.search(r"\bfma\.|\b(mul|add|sub)\.f32|div\.(full|approx)", ptx)
