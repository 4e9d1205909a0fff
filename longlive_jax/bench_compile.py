"""Whether kernels compile for GPUs that are not there.

`python -m longlive_jax.bench_compile GPU OP` reads names of shapes from its input, one a line, and
answers with a line of JSON for each backend.

A program of its own for each GPU and op: Mosaic keeps the architecture that it has first compiled
for, and a compiler that dies takes nothing else with it.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

OK = "ok"
GPUS = ("h100", "b200")
Verdicts = dict[tuple[str, str], str]  # by shape and backend


def verdicts(gpu: str, op: str, shapes: Sequence[str]) -> Verdicts:
    """Of every backend at these shapes: `OK`, or the reason why not."""
    done = subprocess.run(
        [sys.executable, "-m", "longlive_jax.bench_compile", gpu, op],
        input="\n".join(shapes),
        capture_output=True,
        text=True,
    )
    lines = (line for line in done.stdout.splitlines() if line.startswith('{"shape"'))
    found = {(x["shape"], x["backend"]): x["verdict"] for x in map(json.loads, lines)}
    if done.returncode:
        # What it was at, and what it had not begun.
        from longlive_jax.bench_ops import OPS

        died = f"the compiler ended with status {done.returncode}: {_line(done.stderr, -1)}"
        found = {(shape, name): died for shape in shapes for name in OPS[op].backends} | found
    return found


def missing() -> str:
    """Why nothing can be compiled here; empty if it can."""
    from longlive_jax import footprint

    if footprint.toolchain():
        return ""
    return "the compiler for GPUs is not installed (pip install 'longlive-jax[aot]')"


def compiled(gpu: str, op: str, shapes: Sequence[str]) -> Iterator[dict[str, str]]:
    """Compiles in this process. Numbers are bfloat16."""
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding
    from longlive_kernels import absent_gpu

    from longlive_jax import footprint, gpus
    from longlive_jax.bench_ops import OPS

    (device,) = absent_gpu.devices(gpu, gpus.find(gpu).describe())
    row = OPS[op]
    for shape in shapes:
        case = row.case(row.shapes[shape], jnp.bfloat16)
        operands = footprint.placed(case.abstract(), SingleDeviceSharding(device))
        for name, backend in row.backends.items():
            with absent_gpu.target(device):
                verdict = _verdict(case, backend, operands)
            yield {"shape": shape, "backend": name, "verdict": verdict}


def _verdict(case: Any, backend: Any, operands: tuple) -> str:
    import jax

    refused = case.refusal(backend)
    if refused:
        return refused
    try:
        jax.jit(functools.partial(case.call, backend)).lower(*operands).compile()
    except Exception as error:  # noqa: BLE001  # the compiler's answer, whatever it is
        return _line(str(error), 0) or type(error).__name__
    return OK


def _line(text: str, which: int) -> str:
    """The first or the last line that says something, cut."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[which][:200] if lines else ""


def main(gpu: str, op: str) -> None:
    """Answers for every shape that is asked for, as it goes."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    for line in compiled(gpu, op, sys.stdin.read().split()):
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
