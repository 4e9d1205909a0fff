"""A synthetic checkpoint of full size, converted, loaded and run for one chunk of a small picture.

    python experiments/full_size.py --workdir runs/full --json runs/full/report.json

The weights are random bfloat16 numbers under the official names, in shards as they are published.
Every stage runs in a process of its own, so that each has its own peak of memory. Peaks count
pages of mapped files too, which the system takes back when it needs them.
"""

import dataclasses
import functools
import json
import pathlib
import resource
import subprocess
import sys
import time
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import app, flags
from flax import nnx

from longlive_jax import config, output, rollout, weights
from longlive_jax.convert import wan_dit
from longlive_jax.convert.export import wan_config
from longlive_jax.convert.table import Pending
from longlive_jax.dit.model import DiT
from longlive_jax.sampler import make

_WORKDIR = flags.DEFINE_string("workdir", None, "Needs twice the checkpoint's size.", required=True)
_STAGE = flags.DEFINE_enum("stage", None, ["write", "convert", "run"], "One stage only.")
_SIZE = flags.DEFINE_integer("size", 128, "Pixels of the picture's sides.")
_JSON = flags.DEFINE_string("json", None, "Where to write the report.")

PRESET = config.WAN21_T2V_1_3B


def abstract() -> DiT:
    return nnx.eval_shape(lambda: DiT(PRESET.dit, rngs=nnx.Rngs(0)))


def write(folder: pathlib.Path) -> None:
    """The checkpoint, as Wan publishes it."""
    leaves, pending = weights.flatten(abstract()), {}

    def random(name: str, shape: tuple[int, ...]):
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        scale = np.float32(0.5 / np.sqrt(max(np.prod(shape[1:]), 1)))
        yield (rng.standard_normal(shape, np.float32) * scale).astype(ml_dtypes.bfloat16)

    for row in wan_dit.rows(PRESET.dit):
        shape = leaves[row.target].shape
        for i in range(shape[0] if row.stacked else 1):
            name, own = row.source.format(i=i), row.source_shape(shape)
            kind = np.dtype(ml_dtypes.bfloat16)
            pending[name] = Pending(own, kind, functools.partial(random, name, own))
    weights.write(folder, "diffusion_pytorch_model", pending, shard_bytes=1 << 30)
    (folder / "config.json").write_text(json.dumps(wan_config(PRESET.dit)), "utf-8")


def run(folder: pathlib.Path) -> dict[str, float]:
    """Loads the transformer in float32 and denoises one chunk in the preset's 4 steps."""
    start = time.time()
    dit = weights.place(abstract(), weights.read(folder, "dit"), dtype=jnp.float32)
    loaded = time.time()
    cfg = dataclasses.replace(PRESET, height=_SIZE.value, width=_SIZE.value)
    memory = rollout.begin(cfg, [0])
    shape = (1, cfg.dit.text_len, cfg.dit.text_dim)
    read = jax.jit(lambda dit, text: dit.text_kv(text[:, None]))
    text = read(dit, jax.random.normal(jax.random.key(1), shape))
    settings = dict(stream=cfg.stream, solver=make(cfg.sampler))
    noise = rollout.noise(memory, cfg.stream.chunk)
    memory, latents = rollout.generate(dit, memory, text, noise, **settings)
    finite = bool(jnp.isfinite(latents).all())
    first = time.time()
    noise = rollout.noise(memory, cfg.stream.chunk)
    memory, latents = rollout.generate(dit, memory, text, noise, **settings)
    jax.block_until_ready(latents)
    return {
        "load_s": loaded - start,
        "first_chunk_s": first - loaded,
        "chunk_s": time.time() - first,
        "finite": finite and bool(jnp.isfinite(latents).all()),
    }


def stage(name: str, source: pathlib.Path, model: pathlib.Path) -> dict[str, float]:
    if name == "write":
        return write(source) or {}
    if name == "run":
        return run(model)
    from longlive_jax.convert.run import convert

    convert([source], model)
    return {}


def main(_):
    workdir = pathlib.Path(_WORKDIR.value)
    source, model = workdir / "source", workdir / "model"
    if _STAGE.value:
        start = time.time()
        said = stage(_STAGE.value, source, model)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        said |= {"seconds": time.time() - start, "peak_memory_bytes": peak}
        sys.stdout.write(json.dumps(said) + "\n")
        return
    report = {}
    for name in ("write", "convert", "run"):
        command = [sys.executable, __file__, f"--workdir={workdir}", f"--stage={name}"]
        command += [f"--size={_SIZE.value}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        report[name] = json.loads(done.stdout.splitlines()[-1])
    report["checkpoint_bytes"] = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    text = json.dumps(report, indent=1) + "\n"
    sys.stdout.write(text)
    if _JSON.value:
        output.write_report(pathlib.Path(_JSON.value), text)


if __name__ == "__main__":
    app.run(main)
