"""Memory of a distillation step of the 5B on eight GPUs, compiled without having one, as the rows
of Table 2 of the LongLive 2.0 paper.

python experiments/dmd_memory.py --gpu h100 --json dmd.json

With the `[aot]` extra. One video on each device, or --videos, weights spread over all; clips of 32
latents in four chunks, two shots, as `configs/dmd_wan.py:5b-4`. Per device: the student's and the
critic's program, each at its peak.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from longlive_kernels import absent_gpu
from rich.console import Console
from rich.table import Table

from longlive_jax import footprint, gpus, output, sampler, sharding
from longlive_jax.config import WAN22_TI2V_5B, ModelConfig, Precision
from longlive_jax.flow import Flow
from longlive_jax.train.checkpoint import shapes
from longlive_jax.train.distill import Clips, Frozen, Party, Program
from longlive_jax.train.dmd import DMDConfig
from longlive_jax.train.learning import Learning
from longlive_jax.train.self_forcing import SelfForcing
from longlive_jax.train.sequence import Plot
from longlive_jax.train.state import OptimizerConfig

_GPU = flags.DEFINE_string("gpu", "h100", "Which one; longlive plan --help lists them.")
_LAYERS = flags.DEFINE_integer("layers", 30, "Of the transformers.", 1)
_DEVICES = flags.DEFINE_integer("devices", 8, "GPUs of one machine.", 1)
_VIDEOS = flags.DEFINE_integer("videos", 1, "On each GPU.", 1)
_THROUGH = flags.DEFINE_enum("through", "stop", SelfForcing.THROUGH, "A rollout's memory.")
_ATTENTION = flags.DEFINE_enum("attention", "best", ("best", "mosaic"), "What attends.")
_ROWS = flags.DEFINE_list("rows", None, "Numbers of rows; all by default.")
_JSON = flags.DEFINE_string("json", None, "Where to write the numbers.")


@dataclasses.dataclass(frozen=True)
class Row:
    """What each network is: learned whole (rank 0) or by a LoRA, its frozen weights in bfloat16
    ("") or in fewer bits.
    """

    rank: int
    student: str = ""
    teacher: str = ""
    critic: str = ""

    @property
    def name(self) -> str:
        kinds = (kind or "bf16" for kind in (self.student, self.teacher, self.critic))
        return f"{', '.join(kinds)}; {f'LoRA {self.rank}' if self.rank else 'all weights learned'}"


ROWS = (
    Row(0),
    Row(128),
    Row(128, student="nvfp4"),
    Row(128, student="nvfp4", teacher="nvfp4"),
    Row(128, student="nvfp4", teacher="nvfp4", critic="nvfp4"),
)


def network(cfg: ModelConfig, kind: str, mesh: Mesh):
    """By shape, each leaf in its place."""
    precision = Precision.of(kind) if kind else None
    dit = footprint.dit(dataclasses.replace(cfg, precision=precision))
    return shapes(dit, sharding.of_module(dit, mesh))


def plot(cfg: ModelConfig, batch: int, mesh: Mesh) -> tuple:
    """The parts of a `Plot` by shape."""
    where = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    of = lambda kind, *shape: jax.ShapeDtypeStruct((batch, *shape), kind, sharding=where)  # noqa: E731
    text = (cfg.dit.text_len, cfg.dit.text_dim)
    flags_ = (of(jnp.bool_, 4), of(jnp.bool_, 4))
    return of(jnp.float32, 2, *text), of(jnp.float32, *text), of(jnp.int32, 4), *flags_


def programs(
    row: Row,
    cfg: ModelConfig,
    gpu: gpus.GPU,
    count: int,
    videos: int = 1,
    through: str = "stop",
    attention: str = "best",
) -> dict[str, jax.stages.Compiled]:
    """The student's step and the critic's, on `count` devices with so many videos on each."""
    devices = absent_gpu.devices(gpu.name, gpu.describe(), count)
    mesh = sharding.make_mesh(1, count, devices=devices)
    party = Party(Learning(row.rank), OptimizerConfig(1e-5, 1000))
    flow = Flow(cfg.sampler.shift)
    stream = dataclasses.replace(cfg.stream, attention=attention)
    roll = SelfForcing(stream, sampler.make(cfg.sampler), flow, through=through)
    judge = DMDConfig(stream.chunk, shift=cfg.sampler.shift, attention=attention)
    clips = Clips(first=4, next=4, length=4)
    program = Program(cfg, party, party, roll, judge, clips, mesh, jnp.bfloat16)
    made = functools.partial(network, cfg, mesh=mesh)
    frozen = Frozen(made(row.student), made(row.critic), made(row.teacher))
    places = program.places(frozen)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    state = jax.eval_shape(functools.partial(program.create, key=jax.random.key(0)), frozen)
    state = shapes(state, places)
    found = {}
    for which in ("student", "critic"):
        step = getattr(program, f"{which}_step")

        def run(state, frozen, given, key, step=step):
            return step(state, frozen, Plot(*given), key, begins=True, goes_on=False)

        made = jax.jit(run, donate_argnums=0, out_shardings=(places, None, None))
        given = state, frozen, plot(cfg, videos * count, mesh), key
        with absent_gpu.target(devices[0]):
            found[which] = made.lower(*given).compile()
        logging.info("%s, %s: %.1f GB", row.name, which, peak(found[which]) / 1e9)
    return found


def peak(program: jax.stages.Compiled) -> int:
    """Bytes of a device."""
    return program.memory_analysis().peak_memory_in_bytes


def main(_):
    dit = dataclasses.replace(WAN22_TI2V_5B.dit, layers=_LAYERS.value)
    cfg = dataclasses.replace(WAN22_TI2V_5B, dit=dit)
    rows = [ROWS[int(i)] for i in _ROWS.value] if _ROWS.value else ROWS
    gpu = gpus.find(_GPU.value)
    found = {}
    for row in rows:
        how = _VIDEOS.value, _THROUGH.value, _ATTENTION.value
        made = programs(row, cfg, gpu, _DEVICES.value, *how)
        found[row.name] = {which: peak(program) for which, program in made.items()}
    table = Table("student, teacher, critic", "student's step", "critic's step", title=gpu.title)
    for name, each in found.items():
        table.add_row(name, *(f"{size / 1e9:.1f} GB" for size in each.values()))
    Console(width=120).print(table)
    if _JSON.value:
        output.write_report(pathlib.Path(_JSON.value), json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
