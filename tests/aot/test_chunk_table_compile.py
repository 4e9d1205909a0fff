"""Training attention of Mosaic compiled for GPUs that are not there: what the programs are made of.
Needs the [aot] extra.
"""

import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from chunk_table_program import CALLS

pytestmark = pytest.mark.aot

PROGRAM = pathlib.Path(__file__).with_name("chunk_table_program.py")
REPORT = re.compile(
    r"Compiling entry function 'chunk_table_(\w+)_mosaic_gpu_kernel'.*?"
    r"(\d+) bytes spill stores, (\d+) bytes spill loads",
    re.DOTALL,
)
KERNELS = ["forward", "keys", "queries"]


def compiled(gpu: str, *args: str) -> tuple[int, str]:
    """The exit status, and PTX, and what ptxas says of it. JAX itself raises ValueError where a
    kernel asks for more than 227 KiB of shared memory.
    """
    pytest.importorskip(
        "jax_plugins.xla_cuda13", reason="needs the [aot] extra", exc_type=ImportError
    )
    dumps = {f"MOSAIC_GPU_DUMP_{kind}": "1" for kind in ("PTX", "PTXAS")}
    done = subprocess.run(
        [sys.executable, PROGRAM, gpu, *args],
        env=os.environ | dumps,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stdout


# Of a GPU: what is in its programs, and the registers that threads of a block may begin with.
COMPILED = {
    "h100": (
        [f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16" for n in (64, 128)],
        168,
    ),
    "b200": (["tcgen05.mma.cta_group::1.kind::f16"], 128),
}

# Bytes of a thread, by kernel and GPU: where the last tile of a run of keys is not whole.
SPILLED = {} if jax.__version_info__ < (0, 11) else {("h100", "queries"): 4}


@pytest.mark.parametrize(
    ("gpu", "name", "ranks"),
    [
        ("h100", "5b_96_frames_4_ranks", "1"),
        ("h100", "5b_192_frames_4_ranks", "4"),  # in `jax.shard_map`
        ("h100", "1.3b_16s", "1"),
        ("h100", "1.3b_window", "1"),
        ("h100", "5b_384_frames_4_ranks", "1"),
        ("b200", "5b_96_frames_4_ranks", "1"),
        ("b200", "5b_384_frames_4_ranks", "1"),
        ("b200", "1.3b_window", "1"),
    ],
)
def test_training_attention_compiles(gpu, name, ranks):
    status, text = compiled(gpu, name, ranks)
    assert status == 0
    spills = {name: max(map(int, found)) for name, *found in REPORT.findall(text)}
    assert sorted(spills) == KERNELS
    runs = CALLS[name].table.key_runs
    ragged = any((stop - start) * CALLS[name].tokens % 128 for start, stop in runs)
    most = {kernel: SPILLED.get((gpu, kernel), 0) if ragged else 0 for kernel in KERNELS}
    assert all(spills[kernel] <= most[kernel] for kernel in KERNELS), spills
    instructions, most = COMPILED[gpu]
    assert max(map(int, re.findall(r"Used (\d+) registers", text))) <= most
    assert "wgmma.mma_async instructions are serialized" not in text
    assert all(text.count(instruction) >= len(KERNELS) for instruction in instructions)
    # Beside results, two numbers of every query, and some in places that are left empty.
    (temporary,) = re.findall(r"^temporary (\d+)$", text, re.MULTILINE)
    shape = CALLS[name]
    numbers = 4 * shape.batch * shape.heads * shape.queries[1]
    assert 2 * numbers <= int(temporary) < 2.1 * numbers
