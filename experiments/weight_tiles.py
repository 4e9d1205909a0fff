"""What inference in other tiles than training's costs: NVFP4 weights with a scale for 1 x 16 numbers
(inference of LongLive 2.0) and for 16 x 16 (its training), on Gaussian weights and on a model's.

python experiments/weight_tiles.py

Numbers are norms of differences over norms. Of blocks it is what a block adds to its input, which
is a chunk-causal forward of the model's own video under noise; only weights are quantised.
"""

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
TRAINING = Precision.of("nvfp4", weights_only=True, tile=16)
WAYS = {
    "mse, 1 x 16": INFERENCE,
    "mse, 16 x 16": TRAINING,
    "static_6, 1 x 16": Precision.of("nvfp4", weights_only=True, rule="static_6"),
    "static_6, 16 x 16": Precision.of("nvfp4", weights_only=True, tile=16, rule="static_6"),
}
NOISE = (0.3, 0.6, 0.9)  # shares of noise in the video


def main(_):
    model = longlive_jax.load(_MODEL.value)
    plain = weights.flatten(model.dit)
    own = [plain[path + transformer.SUFFIX] for path in transformer.kinds(INFERENCE)]
    gaussian = [jax.random.normal(jax.random.key(0), (1536, 1536))]
    blocks = traced(model)
    results = {
        "Gaussian weights": {name: stored(gaussian, how) for name, how in WAYS.items()},
        f"weights of {_MODEL.value}": {name: stored(own, how) for name, how in WAYS.items()},
        "what its blocks add": {name: blocks(quantised(model, how)) for name, how in WAYS.items()},
    }
    exact = {
        "Gaussian weights": gaussian,
        f"weights of {_MODEL.value}": own,
        "what its blocks add": blocks(model.dit),
    }
    table = Table("", *(f"{name} to exact" for name in WAYS), *PAIRS)
    for row, ways in results.items():
        numbers = [relative(found, exact[row]) for found in ways.values()]
        numbers += [relative(ways[a], ways[b]) for a, b in PAIRS.values()]
        table.add_row(row, *(f"{number:.4f}" for number in numbers))
    Console(width=160).print(table)


# Of the same master weights: how far inference is from what was trained.
PAIRS = {
    "mse, 1 x 16 to 16 x 16": ("mse, 1 x 16", "mse, 16 x 16"),
    "mse, 1 x 16 to static_6, 16 x 16": ("mse, 1 x 16", "static_6, 16 x 16"),
}


def relative(ours: list, theirs: list) -> float:
    """Over all arrays together."""
    apart = sum(float(jnp.sum((x - y) ** 2)) for x, y in zip(ours, theirs, strict=True))
    return (apart / sum(float(jnp.sum(y**2)) for y in theirs)) ** 0.5


def stored(kernels_: list, how: Precision) -> list:
    make = jax.jit(functools.partial(kernels.make, kind="nvfp4", how=how))
    return [make(kernel).dense() for kernel in kernels_]


def quantised(model, how: Precision):
    return jax.jit(functools.partial(transformer.quantize, how=how))(model.dit)


def traced(model):
    """A function of a transformer: what each of its blocks adds, to what the exact one has there."""
    cfg, stream = model.config, model.config.stream
    session = model.session(_PROMPT.value, seed=0)
    while session.frame < cfg.frames_per_chunk * stream.window // stream.chunk:
        session.next_chunk()
    video = session.home.read().rollout.held.latents  # b f h w c
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
