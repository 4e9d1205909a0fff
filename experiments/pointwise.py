"""What XLA makes of a block between its products: norms, modulation, RoPE, gates, residuals.

python experiments/pointwise.py --preset wan21_1_3b --gpu h100

With the `[aot]` extra. Compiles all steps of a chunk, with attention by `mosaic`, for a GPU that
need not be there, and lists the kernels of a block that are neither products nor attention, with
what they read and write. Beside it, what they would if LayerNorm and modulation, RMSNorm and RoPE,
and gated residuals and the norms behind them were one kernel each: the most that such kernels could
save.
"""

import dataclasses
import json
import math
import pathlib
import re

from absl import app, flags
from jax.sharding import SingleDeviceSharding
from longlive_kernels import absent_gpu
from rich.console import Console
from rich.table import Table

from longlive_jax import footprint, gpus, output
from longlive_jax.config import ModelConfig
from longlive_jax.plan import PRESETS

_PRESET = flags.DEFINE_enum("preset", "wan21_1_3b", list(PRESETS), "Whose block.")
_GPU = flags.DEFINE_string("gpu", "h100", "Which one; longlive plan --help lists them.")
_JSON = flags.DEFINE_string("json", None, "Where to write the numbers.")

WIDTHS = {"bf16": 2, "f32": 4, "s32": 4, "pred": 1, "u32": 4}
LINE = re.compile(r"^  (?:ROOT )?%(\S+) = (\w+)\[([\d,]*)\]\S* (\S+?)\((.*?)\)(?:, |$)")
SMALL = 1e6  # bytes: what only concerns a channel or a frame


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Of a block, with megabytes that it reads and writes."""

    name: str
    what: str  # the operation that it ends with
    read_mb: float
    written_mb: float


def program(cfg: ModelConfig, gpu: gpus.GPU) -> str:
    """The text of all steps of a chunk."""
    (device,) = absent_gpu.devices(gpu.name, gpu.describe())
    stream = dataclasses.replace(cfg.stream, attention="mosaic")
    cfg = dataclasses.replace(cfg, stream=stream)
    run, given = footprint.programs(cfg, SingleDeviceSharding(device))["denoise"]
    with absent_gpu.target(device):
        return run.lower(*given).compile().as_text()


def block(text: str) -> list[str]:
    """The lines of the loop over layers in a denoising step: where attention is."""
    bodies = re.split(r"\n(?=%|ENTRY)", text)
    return next(body for body in bodies if 'custom_call_target="mosaic_gpu' in body).splitlines()


def kernels(lines: list[str], cfg: ModelConfig) -> list[Kernel]:
    """Those that are neither products nor a softmax, and large. What is written into slots is a
    chunk's; of a product that is q, k and v side by side, one of these is read.
    """
    sizes, found = {}, []
    for line in lines:
        told = LINE.match(line)
        if told is None:
            continue
        name, kind, shape, op, operands = told.groups()
        numbers = [int(n) for n in shape.split(",") if n]
        each = numbers[1:] if numbers[:1] == [cfg.dit.layers] else numbers  # one layer of a stack
        sizes[name] = written = math.prod(each) * WIDTHS.get(kind, 4)
        product = name.startswith("gemm_fusion") or "dynamic_slice" in name
        if op != "fusion" or product or numbers[-1:] == [cfg.dit.text_len]:
            continue
        if "scatter" in name:
            written = activations(cfg)
        given = [x.strip().lstrip("%") for x in re.sub(r"/\*.*?\*/", "", operands).split(",")]
        new = [x for x in given if "scatter" not in name or sizes.get(x, 0) != sizes[name]]
        read = sum(min(sizes.get(x, 0), written) for x in new)
        if max(written, read) > SMALL:
            what = re.search(r'op_name="[^"]*/([^/"]+)"', line)
            found.append(Kernel(name, what[1] if what else "", read / 1e6, written / 1e6))
    return found


def activations(cfg: ModelConfig) -> int:
    """Bytes of what goes from block to block."""
    return 2 * cfg.stream.chunk * cfg.tokens_per_frame * cfg.dit.dim


def least_mb(cfg: ModelConfig) -> float:
    """Of the kernels that a block would have: norm and modulation (2 passes over activations), q, k
    and v (2 each, k and v into their slots), a gated residual and the norm behind it (4), the
    norm of cross-attention's queries (2), its residual and the norm behind it (4), the gated
    residual of the MLP (3); and its activation, twice the MLP's width.
    """
    return activations(cfg) * (21 + 2 * cfg.dit.ffn_dim / cfg.dit.dim) / 1e6


def main(_):
    cfg, gpu = PRESETS[_PRESET.value], gpus.find(_GPU.value)
    made = kernels(block(program(cfg, gpu)), cfg)
    table = Table("kernel", "ends with", "reads, MB", "writes, MB", title=f"a block, {gpu.title}")
    for one in made:
        table.add_row(one.name, one.what, f"{one.read_mb:.1f}", f"{one.written_mb:.1f}")
    moved, least = sum(one.read_mb + one.written_mb for one in made), least_mb(cfg)
    forwards = cfg.sampler.steps + cfg.stream.clean_pass
    saved = (moved - least) * 1e6 * cfg.dit.layers * forwards / gpu.bandwidth
    console = Console(width=120)
    console.print(table)
    console.print(
        f"{len(made)} kernels move {moved:.0f} MB, the least is {least:.0f} MB:"
        f" {saved * 1e3:.1f} ms of a chunk at {gpu.bandwidth / 1e12:.2f} TB/s"
    )
    if _JSON.value:
        numbers = dict(kernels=[dataclasses.asdict(one) for one in made], least_mb=least)
        output.write_report(pathlib.Path(_JSON.value), json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
