"""Starts a small VAE as a linear code, which training then only has to improve.

In space the code is the principal components of pixel patches; in time, averages and differences (a
Haar step) at each of the two halvings. A feature vector is [average | inner differences | outer
differences], half, quarter and quarter of the width, all the way through. Residual branches begin
at zero. The two heads, which are not linear, are fitted by least squares to the activations they
see. From here a VAE is minutes ahead of one that starts from noise.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax import weights
from longlive_jax.config import VAEConfig
from longlive_jax.vae.fold import patchify
from longlive_jax.vae.layers import chain
from longlive_jax.vae.vae import VAE, Stack, posterior

_OFFSET, _GAIN = (
    8.0,
    3.0,
)  # lift a head's input to where its normalisation and SiLU are nearly linear
_LOGVAR = -4.0  # of the posterior, at first


def linear_start(cfg: VAEConfig, clips: np.ndarray, seed: int) -> VAE:
    """A VAE of one width and resolution that halves time twice, fitted to uint8 clips [b, t, H, W,
    3].

    Raises ValueError for a configuration of another form.
    """
    widths = {cfg.encoder_dim, cfg.decoder_dim} if set(cfg.multipliers) == {1} else set()
    if len(widths) != 1 or cfg.strides != ((2, 1), (2, 1)) or cfg.shortcut or cfg.attention:
        raise ValueError("a linear start is known only for one width and two halvings of time")
    rng, half = np.random.default_rng(seed), cfg.encoder_dim // 2
    abstract = nnx.eval_shape(lambda: VAE(cfg, rngs=nnx.Rngs(0)))
    flat = {name: _draw(rng, name, x.shape) for name, x in weights.flatten(abstract).items()}
    video = clips.astype(np.float32) / 127.5 - 1
    patches = np.asarray(patchify(video, cfg.patch))
    mean, basis = _principal(patches, half)
    basis /= np.sqrt(np.mean(np.var((patches - mean) @ basis, (0, 1, 2, 3))))
    x = ((patches - mean) @ basis)[:, 1:]
    inner = _principal(x[:, 1::2] - x[:, ::2], half // 2)[1]
    x = (x[:, 1::2] + x[:, ::2]) / 2
    outer = _principal(x[:, 1::2] - x[:, ::2], half // 2)[1]
    first, second = slice(half, half + half // 2), slice(half + half // 2, 2 * half)

    _centre(
        flat,
        "encoder.conv_in",
        np.pad(basis, ((0, 0), (0, half))),
        np.pad(-mean @ basis, (0, half)),
    )
    flat["encoder.layers.0.layers.1.time_conv.kernel"] = _halve(inner, first)
    flat["encoder.layers.1.layers.1.time_conv.kernel"] = _halve(outer, second)
    flat["decoder.layers.2.layers.2.time_conv.kernel"] = _double(outer, second)
    flat["decoder.layers.3.layers.2.time_conv.kernel"] = _double(inner, first)
    flat["encoder.layers.4.conv_out.bias"] += _OFFSET
    flat["decoder.layers.4.layers.1.conv_out.bias"] += _OFFSET
    flat["encoder.norm.scale"] *= _GAIN
    flat["decoder.norm.scale"] *= _GAIN
    flat["conv1.bias"][cfg.latent_channels :] = _LOGVAR
    return _fit_heads(abstract, flat, jnp.asarray(video), patches)


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Scales one, biases and last kernels of residual branches zero, pointwise maps the identity,
    others noise.
    """
    if not name.endswith("kernel"):
        return np.full(shape, name.endswith("scale"), np.float32)
    if name.startswith("conv"):
        return np.eye(shape[0], dtype=np.float32)
    if "conv_out" in name and "layers" in name:
        return np.zeros(shape, np.float32)
    return (rng.normal(size=shape) * math.prod(shape[:-1]) ** -0.5).astype(np.float32)


def _principal(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and first `count` principal components (orthonormal columns) over the last axis."""
    x = x.reshape(-1, x.shape[-1])
    return x.mean(0), np.linalg.eigh(np.cov(x.T))[1][:, ::-1][:, :count].astype(np.float32)


def _centre(flat: dict, name: str, matrix: np.ndarray, bias: np.ndarray) -> None:
    """A convolution that looks at its own pixel only."""
    kernel = np.zeros_like(flat[f"{name}.kernel"])
    kernel[len(kernel) // 2, len(kernel) // 2, 0] = matrix
    flat[f"{name}.kernel"], flat[f"{name}.bias"] = kernel, bias.astype(np.float32)


def _halve(basis: np.ndarray, slot: slice) -> np.ndarray:
    """Kernel of a downsampling: averages, and into `slot` the halved difference of the averages."""
    half, width = len(basis), 2 * len(basis)
    taps = np.zeros((3, width, width), np.float32)
    taps[1] = taps[2] = np.eye(width) / 2
    taps[1:, slot] = taps[1:, :, slot] = 0
    taps[1, :half, slot], taps[2, :half, slot] = -basis / 2, basis / 2
    return taps.reshape(3 * width, width)


def _double(basis: np.ndarray, slot: slice) -> np.ndarray:
    """Kernel of an upsampling, the inverse of `_halve` up to what its basis drops."""
    half, width = len(basis), 2 * len(basis)
    taps = np.zeros((3, width, 2, width), np.float32)
    taps[2] = np.eye(width)[:, None]
    taps[2, slot] = 0
    taps[2, slot, 0, :half], taps[2, slot, 1, :half] = -basis.T, basis.T
    return taps.reshape(3 * width, 2 * width)


@jax.jit
def _before_head(stack: Stack, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The last features of an encoder or a decoder, and what its last convolution sees."""
    x, _ = chain(stack.layers, stack.conv_in(x, None, True)[0], None, True)
    return x, jax.nn.silu(stack.norm(x))


def _fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares with a bias in the last row and a little ridge."""
    x = np.concatenate([x, np.ones((len(x), 1), x.dtype)], 1).astype(np.float64)
    return np.linalg.solve(x.T @ x + 1e-4 * len(x) * np.eye(x.shape[1]), x.T @ y)


def _fit_heads(abstract: VAE, flat: dict, video: jax.Array, patches: np.ndarray) -> VAE:
    def model() -> VAE:
        return weights.unflatten(abstract, {name: jnp.asarray(x) for name, x in flat.items()})

    channels = flat["decoder.conv_in.kernel"].shape[-2]
    rows = lambda x: np.asarray(x).reshape(-1, x.shape[-1])  # noqa: E731
    code, seen = map(rows, _before_head(model().encoder, jnp.asarray(patches)))
    mean, basis = _principal(code, channels)
    scale = np.std((code - mean) @ basis, 0)
    solved = _fit(seen, (code - mean) @ basis / scale)
    logvar = ((0, 0), (0, channels))
    solved = np.pad(solved, logvar)
    _centre(flat, "encoder.conv_out", solved[:-1], solved[-1])
    _centre(flat, "decoder.conv_in", (basis * scale).T, mean)

    z = posterior(model(), video)[0]
    seen = _before_head(model().decoder, z)[1]
    solved = _fit(rows(seen), rows(patches))
    _centre(flat, "decoder.conv_out", solved[:-1], solved[-1])
    return model()
