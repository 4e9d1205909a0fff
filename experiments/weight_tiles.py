"""What inference in other tiles than training's costs: NVFP4 weights with a scale for 1 x 16
numbers (inference of LongLive 2.0) and for 16 x 16 (its training), of Gaussian weights and a
model's.

python experiments/weight_tiles.py

Numbers are norms of differences over norms. Of blocks it is what a block adds to its input, in a
chunk-causal forward of the model's own video under noise; weights alone are quantised.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from absl import app, flags
from einops import rearrange
from rich.console import Console
from rich.table import Table

import longlive_jax
from longlive_jax import weights
from longlive_jax.config import Precision
from longlive_jax.dit import mask
from longlive_jax.dit.attention import masked
from longlive_jax.dit.rope import phases
from longlive_jax.quant import kernels, transformer

_MODEL = flags.DEFINE_string("model", "tiny", "A model's name or folder.")
_PROMPT = flags.DEFINE_string("prompt", "a red circle moves left over a black background", "")

INFERENCE = Precision.of("nvfp4", weights_only=True)
WAYS = {
    f"{rule}, {tile} x 16": dataclasses.replace(INFERENCE, rule=rule, tile=tile)
    for rule in ("mse", "static_6")
    for tile in (1, 16)
}
# Of the same weights: how far what infers is from what was trained (LongLive 2.0's two recipes).
PAIRS = (("mse, 1 x 16", "mse, 16 x 16"), ("mse, 1 x 16", "static_6, 16 x 16"))
NOISE = (0.3, 0.6, 0.9)  # shares of noise in the video


def main(_):
    model = longlive_jax.load(_MODEL.value)
    flat = weights.flatten(model.dit)
    own = [flat[path + transformer.SUFFIX] for path in transformer.kinds(INFERENCE)]
    gaussian = [jax.random.normal(jax.random.key(0), (1536, 1536))]
    added = traced(model)
    exact = [gaussian, own, added(model.dit)]
    made = {
        name: [stored(gaussian, how), stored(own, how), added(quantised(model, how))]
        for name, how in WAYS.items()
    }
    rows = {f"{name}: to exact": (made[name], exact) for name in WAYS}
    rows |= {f"{a}: to {b}": (made[a], made[b]) for a, b in PAIRS}
    table = Table("", "Gaussian weights", f"weights of {_MODEL.value}", "what its blocks add")
    for name, both in rows.items():
        errors = (relative(*columns) for columns in zip(*both, strict=True))
        table.add_row(name, *(f"{error:.3f}" for error in errors))
    Console().print(table)


def relative(ours: list, theirs: list) -> float:
    """Over all arrays together."""
    apart = sum(float(jnp.sum((x - y) ** 2)) for x, y in zip(ours, theirs, strict=True))
    return (apart / sum(float(jnp.sum(y**2)) for y in theirs)) ** 0.5


def stored(plain: list, how: Precision) -> list:
    make = jax.jit(functools.partial(kernels.make, kind="nvfp4", how=how))
    return [make(kernel).dense() for kernel in plain]


def quantised(model, how: Precision):
    return jax.jit(functools.partial(transformer.quantize, how=how))(model.dit)


def traced(model):
    """A function of a transformer: what each of its blocks adds, given what the exact one is."""
    cfg, stream = model.config, model.config.stream
    session = model.session(_PROMPT.value, seed=0)
    while session.frame < cfg.frames_per_chunk * stream.window // stream.chunk:
        session.next_chunk()
    video = session.state.rollout.held.latents  # b f h w c
    text = model.prompt_kv([_PROMPT.value])
    f, h, w = video.shape[1:4]
    positions = jnp.arange(f, dtype=jnp.float32)[None]
    angles = phases(cfg.dit, positions, h // cfg.dit.patch[1], w // cfg.dit.patch[2])
    attn = masked(mask.table(mask.clean(f, stream.chunk)), angles)

    def added(dit, sigma):
        noise = jax.random.normal(jax.random.key(1), video.shape)
        latents = (1 - sigma) * video + sigma * noise
        exact, x = model.dit, model.dit.patch_embedding(model.dit.patchify(latents))
        time = exact.time_projection(jax.nn.silu(exact.time_embedding(sigma[None, None] * 1000)))
        time = rearrange(time, "b m (six e) -> b m six e", six=6)

        def layer(x, both):
            ours, theirs, kv = both
            after = theirs(x, time, kv, attn, None)[0]
            return after, ours(x, time, kv, attn, None)[0] - x

        return jax.lax.scan(layer, x, (dit.blocks, exact.blocks, text))[1]

    run = jax.jit(added)
    return lambda dit: [run(dit, jnp.float32(sigma)) for sigma in NOISE]


if __name__ == "__main__":
    app.run(main)
