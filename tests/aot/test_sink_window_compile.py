"""Attention over slots compiled for GPUs that are not there: what the programs are made of.

Needs the [aot] extra.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from longlive_kernels import absent_gpu
from longlive_kernels.attention.sink_window import cudnn, shapes, xla
from longlive_kernels.attention.sink_window.call import Call

from longlive_jax import footprint
from longlive_jax.config import WAN21_T2V_1_3B, WAN22_TI2V_5B

pytestmark = pytest.mark.aot

PROGRAM = pathlib.Path(__file__).with_name("sink_window_program.py")
PRESETS = {"5b": WAN22_TI2V_5B, "1.3b": WAN21_T2V_1_3B}
REAL = ["5b_chunk", "5b_recache", "1.3b_chunk"]
SCORES = {  # kinds of slots whose keys are multiplied as they are
    "int8_scores": "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8",
    "fp8_scores": "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3",
}
# Bytes, by threads of a B200 that unpack slots where others turn queries. By ptxas 13.5; that of
# 13.0 spills 12 of NVFP4 with jax 0.10, and more than these with 0.12.
SPILLED = {"int8": 16, "nvfp4": 16, "fp8": 0 if jax.__version_info__ < (0, 11) else 16}
# What a GPU's kernel multiplies with, and the threads of a block.
COMPILED = {
    "h100": ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", 384),
    "b200": ("tcgen05.mma.cta_group::1.kind::f16", 512),
}


def mosaic_program(*args: str) -> tuple[int, str]:
    """The exit status of compiling the kernel, and its PTX and what ptxas says of it."""
    pytest.importorskip(
        "jax_plugins.xla_cuda13", reason="needs the [aot] extra", exc_type=ImportError
    )
    dumps = {f"MOSAIC_GPU_DUMP_{kind}": "1" for kind in ("PTX", "PTXAS")}
    done = subprocess.run(
        [sys.executable, PROGRAM, *args],
        env=os.environ | dumps,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def temporary(text: str) -> int:
    (size,) = re.findall(r"^temporary (\d+)$", text, re.MULTILINE)
    return int(size)


@pytest.mark.parametrize(
    ("gpu", "name", "kind"),
    [
        *(("h100", name, kind) for name in REAL for kind in (*shapes.KINDS, *SCORES)),
        *(("b200", name, "bfloat16") for name in REAL),
        ("b200", "5b_chunk", "int8"),
        ("b200", "1.3b_chunk", "fp8"),
        ("b200", "5b_recache", "nvfp4"),
        *((gpu, "1.3b_relative", kind) for gpu in COMPILED for kind in shapes.KINDS),
    ],
)
def test_mosaic_compiles(gpu, name, kind):
    """Nothing is spilled but `SPILLED`, and slots are neither copied nor unpacked in memory."""
    status, text = mosaic_program(gpu, "mosaic", name, kind)
    assert status == 0, text[-2000:]
    instruction, threads = COMPILED[gpu]
    assert instruction in text and SCORES.get(kind, "") in text
    shape = shapes.SHAPES[name]
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    most = SPILLED.get(kind, 0) if gpu == "b200" and shape.relative else 0
    assert len(spills) >= 2 and max(map(int, spills)) <= most
    (registers,) = re.findall(r"Used (\d+) registers", text)
    assert int(registers) <= 2**16 // threads // 8 * 8
    if gpu == "b200":
        allocated = r"mov\.b32\s+(%r\d+), (\d+);\s+(?://.*\s+)?tcgen05\.alloc\S+\s+\S+ \1;"
        (columns,) = re.findall(allocated, text)
        assert columns[1] == "512"  # all of the tensor cores' memory: one block at a time
    # Small numbers are zeros to what flushes them: unpacking must not.
    assert set(re.findall(r"\S*ftz\S*", text)) <= {"ex2.approx.ftz.f32"}
    frame = 2 * shape.tokens * shape.heads * shape.width
    scales = {"bfloat16": 0, "nvfp4": shape.width // 16}.get(kind, 1)
    scales *= 2 * 4 * shape.tokens * shape.heads * shape.table.shape[2]
    # NVFP4 has queries, fresh frames and the result in another order of channels.
    ordered = 4 * frame * shape.table.shape[1] if kind == "nvfp4" else 0
    # With scores of eight bits: queries and fresh keys, which are rounded.
    rounded = frame * shape.table.shape[1] if kind in SCORES else 0
    # Where queries are turned: those, with what they are turned towards, or filled up.
    pairs = frame * shape.table.shape[1] if shape.relative else 0
    assert temporary(text) < 1.1 * (scales + ordered + rounded + pairs) + 1e5


@pytest.mark.parametrize(("gpu", "sm", "units"), [("b200", 90, "wgmma"), ("h100", 100, "tcgen05")])
def test_a_kernel_does_not_compile_for_another_architecture(gpu, sm, units):
    status, text = mosaic_program(gpu, "mosaic", "5b_chunk", "bfloat16", str(sm))
    assert status != 0
    assert units in text


def tokamax_version() -> tuple[int, ...]:
    """Skips where it is not installed."""
    if importlib.util.find_spec("tokamax") is None:
        pytest.skip("needs tokamax: pip install tokamax")
    return tuple(int(x) for x in importlib.metadata.version("tokamax").split(".")[:3])


def copies(name: str) -> int:
    """Bytes of the layer's keys and values, side by side: once, whatever the query frames see; and
    of queries of a frame and its result in a loop.
    """
    shape = shapes.SHAPES[name]
    window, queries = math.prod(shape.keys[1:]), math.prod(shape.queries)
    of_frame = 0 if shape.order == "prefix" else 2 * queries // shape.table.shape[1]
    return 2 * (2 * window + of_frame)


@pytest.mark.parametrize(
    ("gpu", "name", "kind"),
    [
        *((gpu, name, "bfloat16") for gpu in COMPILED for name in REAL),
        ("h100", "1.3b_chunk", "nvfp4"),
    ],
)
def test_tokamax_compiles(gpu, name, kind):
    """Its kernel for all query frames, or in a loop for one after the other. On a B200 two blocks
    work as one (tokamax 0.0.12), or each by itself with some spills (0.0.17).
    """
    version = tokamax_version()
    status, text = mosaic_program(gpu, "tokamax", name, kind)
    assert status == 0, text[-2000:]
    instruction, most = COMPILED[gpu][0], 0
    if gpu == "b200" and version < (0, 0, 17):
        instruction = instruction.replace("cta_group::1", "cta_group::2")
    elif gpu == "b200":
        most = 164
    assert instruction in text
    spills = re.findall(r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert len(spills) == 1 and max(map(int, spills[0])) <= most
    assert re.findall(r"Used (\d+) registers", text) == ["168"]
    # Of dequantised keys or values there is a second copy, into which the chunk's own are put.
    assert temporary(text) < 1.02 * copies(name) * (1.5 if kind == "nvfp4" else 1)


def test_the_gradient_of_tokamax_compiles_for_hopper():
    """That for Blackwell asks for more shared memory than there is (tokamax 0.0.12), or is there
    (0.0.17).
    """
    version = tokamax_version()
    status, text = mosaic_program("h100", "tokamax", "1.3b_chunk", "gradient")
    assert status == 0, text[-2000:]
    assert text.count("bytes spill stores") > 1  # the forward alone
    status, text = mosaic_program("b200", "tokamax", "1.3b_chunk", "gradient")
    if version < (0, 0, 17):
        assert status != 0 and "exceeds available shared memory" in text
    else:
        assert status == 0 and text.count("bytes spill stores") > 1


@pytest.mark.parametrize("gpu", ["h100", "b200"])
@pytest.mark.parametrize("name", REAL)
def test_cudnn_is_called_by_what_compiles(device, gpu, name):
    """By XLA, to the call of cuDNN, which makes a kernel of it where it is installed; for the
    gradient to one of each kind.
    """
    program = attention(cudnn.attend, name, device(gpu))
    assert program.as_text().count('custom_call_target="__cudnn$fmhaSoftmax"') == 1
    assert program.memory_analysis().temp_size_in_bytes < 1.02 * copies(name)
    if name == "1.3b_chunk":
        text = attention(gradient(cudnn.attend), name, device(gpu)).as_text()
        for kind in ("fmhaSoftmax", "fmhaSoftmaxBackward"):
            assert text.count(f'custom_call_target="__cudnn${kind}"') == 1


def gradient(attend):
    """Of queries."""
    of_queries = lambda call, q: attend(dataclasses.replace(call, q=q))  # noqa: E731
    return lambda call: jax.vjp(functools.partial(of_queries, call), call.q)[1](call.q)


def attention(function, name: str, sharding):
    """The program of a call with slots in bfloat16."""
    shape = shapes.SHAPES[name]

    def array(sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    def attend(q, k, v, visible, layer):
        return function(Call(q, k, v, visible, layer, order=shape.order))

    table, visible = array(shape.keys), array(shape.asked.shape, bool)
    given = (array(shape.queries), table, table, visible, array((), jnp.int32))
    (device,) = sharding.device_set
    with absent_gpu.target(device):
        return jax.jit(attend).lower(*given).compile()


@pytest.mark.parametrize("gpu", ["h100", "b200"])
@pytest.mark.parametrize("name", REAL)
def test_xla_writes_the_scores_of_one_step(device, gpu, name):
    """float32, the weights in bfloat16, and less than a fifth beside them: no copy of the window,
    and none of the table.
    """
    shape, program = shapes.SHAPES[name], attention(xla.attend, name, device(gpu))
    step = shape.heads * shape.tokens**2 * (4 + 2)
    queries = 2 * shape.queries[1] * shape.heads * shape.width
    assert program.memory_analysis().temp_size_in_bytes < 1.2 * step + 2 * queries


def layers(name: str, kv: str, count: int = 2):
    cfg = PRESETS[name]
    return dataclasses.replace(
        cfg,
        dit=dataclasses.replace(cfg.dit, layers=count),
        stream=dataclasses.replace(cfg.stream, kv=kv),
    )


@pytest.mark.parametrize("kv", ["bf16", "nvfp4"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_recache_has_no_whole_score_matrix(device, name, kv):
    """Of a 5B window that needed 114 GB; what is left is the MLP's, of all its tokens."""
    cfg = layers(name, kv)
    stream = dataclasses.replace(cfg.stream, attention="xla")
    cfg = dataclasses.replace(cfg, stream=stream)
    program, given = footprint.programs(cfg, device("h100"))["switch"]
    compiled = program.lower(*given).compile()
    tokens = cfg.stream.window * cfg.tokens_per_frame
    of_frame = f"{cfg.dit.heads},{cfg.tokens_per_frame},{cfg.tokens_per_frame}"
    text = compiled.as_text()
    assert f"f32[{of_frame}]" in text
    assert not re.search(rf"\[(\d+,)*{tokens},{tokens}\]", text)
    memory = compiled.memory_analysis()
    above = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    mlp = 2 * tokens * (2 * cfg.dit.ffn_dim + 2 * cfg.dit.dim)
    assert above < 1.25 * mlp < 4 * cfg.dit.heads * tokens**2 / 10
