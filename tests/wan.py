"""The small Wan models of the golden cases, loaded through our name table."""

import functools
import pathlib

import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.config import DiTConfig
from longlive_jax.convert import wan_dit
from longlive_jax.convert.table import fill
from longlive_jax.dit.model import DiT, TextKV

GOLDEN = pathlib.Path(__file__).parent / "golden"
LONGLIVE2 = DiTConfig(dim=64, ffn_dim=128, heads=2, layers=2, channels=4, text_dim=24, text_len=12)


def load(cfg: DiTConfig, tensors: dict[str, np.ndarray]) -> DiT:
    abstract = nnx.eval_shape(lambda: DiT(cfg, rngs=nnx.Rngs(0)))
    return fill(abstract, wan_dit.rows(cfg), tensors)


@functools.cache
def longlive2(name: str) -> DiT:
    """The generator ("gen") or the real score ("real")."""
    with np.load(GOLDEN / "longlive2" / f"weights_{name}.npz") as file:
        return load(LONGLIVE2, {k.removeprefix("w/"): v for k, v in file.items()})


def weights(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k.removeprefix("w/"): v for k, v in case.items() if k.startswith("w/")}


def channel_last(x: np.ndarray) -> jnp.ndarray:
    """b c f h w -> b f h w c, the axes in front of these kept."""
    return jnp.asarray(np.moveaxis(x, -4, -1))


def channel_first(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, -4)


def prompts(dit: DiT, context: np.ndarray, batch: int) -> TextKV:
    """b * s prompts, sample-major, as s segments."""
    return dit.text_kv(jnp.asarray(context.reshape(batch, -1, *context.shape[1:])))
