"""Memory and speed of weights and caches in fewer bits, of one model on this machine.

python experiments/storage_costs.py --json runs/storage.json

All of them are alive at the same time and make a chunk each in turn, so that what else runs slows
all of them alike: ratios are of one run, and to the first row. Chunks count when the window is
full, and of these the fastest, which was disturbed least.
"""

import dataclasses
import json
import pathlib
import time

import jax.numpy as jnp
from absl import app, flags
from rich.console import Console
from rich.table import Table

import longlive_jax
from longlive_jax import cache_dir, footprint, output, report

_MODEL = flags.DEFINE_string("model", "tiny", "A model's name or folder.")
_PROMPT = flags.DEFINE_string("prompt", "a red circle moves left over a black background", "")
_CHUNKS = flags.DEFINE_integer("chunks", 30, "Measured chunks of each.", 1)
_JSON = flags.DEFINE_string("json", None, "Where to write the table.")


@dataclasses.dataclass(frozen=True)
class Row:
    """dtype: of everything that is not in fewer bits. kv: None is as the model computes."""

    dtype: str = "float32"
    precision: str | None = None
    weights_only: bool = False
    kv: str | None = None

    @property
    def name(self) -> str:
        alone = " alone" if self.weights_only else ""
        matrices = f"{self.precision}{alone} in {self.dtype}" if self.precision else self.dtype
        return f"{matrices}, KV {self.kv or self.dtype}"

    def session(self):
        model = longlive_jax.load(_MODEL.value, dtype=jnp.dtype(self.dtype))
        if self.precision:
            model = model.quantized(self.precision, weights_only=self.weights_only)
        return (model.streaming(kv=self.kv) if self.kv else model).session(_PROMPT.value)


KINDS = ("int8", "fp8", "nvfp4")
ROWS = (
    Row(),
    Row("bfloat16"),
    *(Row(precision=kind) for kind in KINDS),
    *(Row(precision=kind, weights_only=True) for kind in KINDS),
    Row("bfloat16", "nvfp4"),
    Row("bfloat16", "nvfp4", weights_only=True),
    *(Row(kv=kind) for kind in ("bf16", *KINDS)),
    Row(precision="nvfp4", kv="nvfp4"),
)


def main(_):
    cache_dir.enable()
    sessions = {row: row.session() for row in ROWS}
    filling = -(-next(iter(sessions.values())).model.config.stream.window // 3) + 2
    taken = {row: [] for row in ROWS}
    for number in range(filling + _CHUNKS.value):
        for row, session in sessions.items():
            begun = time.perf_counter()
            frames = len(session.next_chunk())
            whole = time.perf_counter() - begun
            if number >= filling:
                taken[row].append((whole, session.last.denoise_s, frames))
    found = to_first([numbers(row, sessions[row], taken[row]) for row in ROWS])
    table = Table(*found[0], title=report.device_name())
    for row in found:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()))
    Console(width=120).print(table)
    if _JSON.value:
        said = {"device": report.device_name(), "versions": report.versions(), "rows": found}
        output.write_report(pathlib.Path(_JSON.value), json.dumps(said, indent=1) + "\n")


def numbers(row: Row, session, taken: list[tuple[float, float, int]]) -> dict:
    """Of the fastest chunk, and bytes."""
    whole, denoise, frames = map(min, zip(*taken, strict=True))
    cache = session.state.rollout.cache
    return {
        "matrices and memory": row.name,
        "DiT, MB": footprint.nbytes(session.model.dit) / 1e6,
        "KV, MB": footprint.nbytes((cache.k, cache.v)) / 1e6,
        "denoise FPS": frames / denoise,
        "ms a chunk": whole * 1e3,
    }


def to_first(found: list[dict]) -> list[dict]:
    """With the time of a chunk as a share of the first row's."""
    first = found[0]["ms a chunk"]
    return [row | {"to the first": row["ms a chunk"] / first} for row in found]


if __name__ == "__main__":
    app.run(main)
