"""A model of any size that no file holds: `longlive bench --preset NAME --random_weights`.

How fast a model is does not depend on what its weights are, but on their shapes and types. Those
are a preset's; the numbers are drawn on the device. Prompts become random embeddings, so that no
text encoder is needed: encoding a prompt is in none of the times.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longlive_jax import config, footprint, plan, report, weights
from longlive_jax.config import ModelConfig, TAEConfig, VAEConfig
from longlive_jax.dit.model import DiT
from longlive_jax.errors import InputError
from longlive_jax.model import Model, Origin
from longlive_jax.text.encoder import TextEncoder
from longlive_jax.vae.build import build
from longlive_jax.vae.tae import TAE
from longlive_jax.vae.vae import VAE

WEIGHTS = "random; prompts are random embeddings, no text encoder runs"
TAES = (config.WAN21_TAE, config.WAN22_TAE)
# LightVAEs are Wan2.2's with a half and a quarter of its channels (`lightvae_5b_wrapper.py`).
PRUNED = {"light": 2, "light_quarter": 4}


@dataclasses.dataclass(frozen=True)
class RandomText(TextEncoder):
    """Random embeddings of all tokens, the same for the same prompt."""

    umt5: None
    tokenizer: None
    text_len: int
    width: int
    dtype: Any

    def __call__(self, prompts: Sequence[str]) -> Float[Array, "b text_len d"]:
        shape = (self.text_len, self.width)
        keys = (jax.random.key(zlib.crc32(prompt.encode())) for prompt in prompts)
        return jnp.stack([jax.random.normal(key, shape, self.dtype) for key in keys])


def load(
    preset: str, *, vae: str = "full", seed: int = 0, transformer: bool = True, dtype: Any = None
) -> Model:
    """A model of that size. Its faster decoders are those that fit its latents.

    vae: "full", or the name of such a decoder. transformer: without it, the transformer is there by
    shape only. dtype: of the weights; None is float32 on a CPU and bfloat16 on an accelerator.

    Raises:
      InputError: there is no such decoder.
    """
    cfg = sized(plan.PRESETS[preset])
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    try:
        shape = cfg.decoder(vae)
    except KeyError as error:
        names = ", ".join(["full", *(name for name, _ in cfg.decoders)])
        raise InputError(f'--preset {preset} has no VAE "{vae}", only {names}') from error
    keys = jax.random.split(jax.random.key(seed, impl="rbg"))  # quick to compile for many shapes
    dit = nnx.eval_shape(lambda: DiT(cfg.dit, rngs=nnx.Rngs(0)))
    dit = drawn(dit, keys[0], dtype) if transformer else dit
    text = RandomText(None, None, cfg.dit.text_len, cfg.dit.text_dim, dtype)
    return Model(cfg, dit, decoder(shape, keys[1], dtype), text, Origin(WEIGHTS, vae))


def sized(cfg: ModelConfig) -> ModelConfig:
    """The preset with the faster decoders of its latents that there are."""
    own = (cfg.vae.latent_channels, cfg.vae.time_stride, cfg.vae.space_stride)
    fits = lambda tae: (tae.latent_channels, tae.time_stride, tae.space_stride) == own  # noqa: E731
    pruned = PRUNED if cfg.vae == config.WAN22_VAE else {}
    light = tuple((name, _narrowed(cfg.vae, times)) for name, times in pruned.items())
    decoders = tuple(("tae", tae) for tae in TAES if fits(tae))
    return dataclasses.replace(cfg, decoders=light + decoders)


def _narrowed(cfg: VAEConfig, times: int) -> VAEConfig:
    widths = dict(encoder_dim=cfg.encoder_dim // times, decoder_dim=cfg.decoder_dim // times)
    return dataclasses.replace(cfg, **widths)


def decoder(cfg: VAEConfig | TAEConfig, key: Array, dtype: Any) -> VAE | TAE:
    """A VAE of either kind with random weights."""
    return drawn(nnx.eval_shape(lambda: build(cfg, rngs=nnx.Rngs(0))), key, dtype)


def drawn(abstract: Any, key: Array, dtype: Any) -> Any:
    """The module with random weights, of the size that keeps activations at theirs. One parameter
    after the other is made where it stays.
    """
    flat = weights.flatten(abstract)
    keys = jax.random.split(key, len(flat))
    made = {
        path: jax.block_until_ready(_parameter(key, path, x.shape, jnp.dtype(dtype)))
        for key, (path, x) in zip(keys, flat.items(), strict=True)
    }
    return weights.unflatten(abstract, made)


def _parameter(key: Array, path: str, shape: tuple[int, ...], dtype: Any) -> Array:
    name = path.rpartition(".")[2]
    if name in ("scale", "bias"):
        return jnp.full(shape, float(name == "scale"), dtype)
    own = shape[path.startswith("blocks.") :]  # without the axis of layers
    inputs = math.prod(own[:-1]) if name == "kernel" else own[-1]
    return _uniform(key, shape, dtype, (3 / inputs) ** 0.5)  # of variance 1 / inputs


@functools.partial(jax.jit, static_argnums=(1, 2))
def _uniform(key: Array, shape: tuple[int, ...], dtype: Any, largest: Any) -> Array:
    return jax.random.uniform(key, shape, dtype, -1, 1) * jnp.asarray(largest, dtype)


def check_memory(ask: plan.Ask, suite: str, *, switches: bool = True) -> None:
    """Raises InputError where the device has too little memory for a suite; allocates nothing.

    switches: whether prompts change inside a shot.
    """
    need, free = needed(ask, suite, switches), report.free_memory()
    if need > free:
        least = "at least " if suite == "train" else ""
        limit = "" if jax.default_backend() == "cpu" else " (XLA_PYTHON_CLIENT_MEM_FRACTION)"
        raise InputError(
            f"--preset {ask.preset} --suite {suite} needs {least}{plan.gigabytes(need)} of memory,"
            f" and JAX may take {plan.gigabytes(free)}{limit} on {report.device_name()}"
        )


def needed(ask: plan.Ask, suite: str, switches: bool) -> int:
    """Bytes: what `plan` says without a text encoder, in the type of the platform. Of training the
    weights, the state of a step and gradients alone.
    """
    cfg, wide = ask.config, 2 if jax.default_backend() == "cpu" else 1  # plans are in bfloat16
    plain = footprint.nbytes(footprint.dit(dataclasses.replace(cfg, precision=None)))
    if suite == "train":
        from longlive_jax.train import plan as training

        held = training.resident(training.Ask(ask.preset, ask.seconds), 0)
        return plain * wide + held.peak + held.weights
    decoding = footprint.by_formula(cfg, None, ("decode",))
    if suite == "vae":  # in one of its types; what is too large for the other, the suite says
        memory = plan.resident(ask, decoding)
        return wide * memory.weights.vae + memory.vae_carry + decoding["decode"]
    names = ("denoise", "switch") if switches else ("denoise",)
    memory = plan.resident(ask, decoding | footprint.by_formula(cfg, None, names))
    peak = memory.peak(switch=switches) - memory.weights.text
    quantising = plain + memory.weights.dit if cfg.precision else 0
    return wide * max(peak, quantising)
