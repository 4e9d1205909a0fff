"""Names of the Wan VAE's parameters (Wan2.1 `vae.py`, Wan2.2 `vae2_2.py`).

2.1 numbers the layers of all levels in one flat list; 2.2 (the form with shortcuts) numbers levels,
and layers within.
"""

from __future__ import annotations

import itertools

from longlive_jax.config import VAEConfig
from longlive_jax.convert.table import CONV2D, Row

CAUSAL = (3, 4, 2, 1, 0)  # out in t h w -> h w t in out


def _conv(source: str, target: str) -> list[Row]:
    return [
        Row(f"{source}.weight", f"{target}.kernel", CAUSAL),
        Row(f"{source}.bias", f"{target}.bias"),
    ]


def _point(source: str, target: str, ones: tuple[int, ...]) -> list[Row]:
    return [
        Row(f"{source}.weight", f"{target}.kernel", (1, 0), squeeze=ones),
        Row(f"{source}.bias", f"{target}.bias"),
    ]


def _norm(source: str, target: str, ones: tuple[int, ...] = (1, 2, 3)) -> list[Row]:
    return [Row(f"{source}.gamma", f"{target}.scale", squeeze=ones)]


def _block(source: str, target: str, *, widens: bool) -> list[Row]:
    return [
        *_norm(f"{source}.residual.0", f"{target}.norm_in"),
        *_conv(f"{source}.residual.2", f"{target}.conv_in"),
        *_norm(f"{source}.residual.3", f"{target}.norm_out"),
        *_conv(f"{source}.residual.6", f"{target}.conv_out"),
        *(_point(f"{source}.shortcut", f"{target}.shortcut", (2, 3, 4)) if widens else []),
    ]


def _resample(source: str, target: str, stride: tuple[int, int], width: int) -> list[Row]:
    time, space = stride
    spatial = [
        Row(f"{source}.resample.1.weight", f"{target}.space_conv.kernel", CONV2D),
        Row(f"{source}.resample.1.bias", f"{target}.space_conv.bias"),
    ]
    temporal = [
        Row(
            f"{source}.time_conv.weight",
            f"{target}.time_conv.kernel",
            (2, 1, 0),  # out in t -> (t in) out
            squeeze=(3, 4),
            merge=(3, width),
        ),
        Row(f"{source}.time_conv.bias", f"{target}.time_conv.bias"),
    ]
    return spatial * (space > 1) + temporal * (time > 1)


def _middle(cfg: VAEConfig, source: str, target: str, start: int) -> list[Row]:
    last = 2 if cfg.attention else 1
    attention = [
        *_norm(f"{source}.1.norm", f"{target}.{start + 1}.norm", (1, 2)),
        *_point(f"{source}.1.to_qkv", f"{target}.{start + 1}.qkv", (2, 3)),
        *_point(f"{source}.1.proj", f"{target}.{start + 1}.proj", (2, 3)),
    ]
    return [
        *_block(f"{source}.0", f"{target}.{start}", widens=False),
        *(attention if cfg.attention else []),
        *_block(f"{source}.{last}", f"{target}.{start + last}", widens=False),
    ]


def _levels(cfg: VAEConfig, side: str, name: str, start: int) -> list[Row]:
    down = side == "encoder"
    dims = [(cfg.encoder_dim if down else cfg.decoder_dim) * m for m in cfg.multipliers]
    strides, blocks = cfg.strides, cfg.res_blocks
    if not down:
        dims, strides, blocks = dims[::-1], strides[::-1], blocks + 1
    width, flat, rows = cfg.encoder_dim if down else dims[0], itertools.count(), []
    for level, (dim, stride) in enumerate(zip(dims, (*strides, (1, 1)), strict=True)):
        nested = (f"{level}.{name}.{i}" for i in itertools.count())
        number = nested if cfg.shortcut else map(str, flat)
        target = f"{side}.layers.{start + level}.layers"
        for i in range(blocks):
            source = f"{side}.{name}.{next(number)}"
            rows += _block(source, f"{target}.{i}", widens=i == 0 and width != dim)
        if stride != (1, 1):
            source = f"{side}.{name}.{next(number)}"
            rows += _resample(source, f"{target}.{blocks}", stride, dim)
        halves = not down and not cfg.shortcut and stride[1] > 1
        width = dim // 2 if halves else dim
    return rows


def rows(cfg: VAEConfig) -> list[Row]:
    """Official name → path in `VAE`."""
    middle = 3 if cfg.attention else 2
    return [
        *_conv("encoder.conv1", "encoder.conv_in"),
        *_levels(cfg, "encoder", "downsamples", 0),
        *_middle(cfg, "encoder.middle", "encoder.layers", len(cfg.multipliers)),
        *_norm("encoder.head.0", "encoder.norm"),
        *_conv("encoder.head.2", "encoder.conv_out"),
        *_point("conv1", "conv1", (2, 3, 4)),
        *_point("conv2", "conv2", (2, 3, 4)),
        *_conv("decoder.conv1", "decoder.conv_in"),
        *_middle(cfg, "decoder.middle", "decoder.layers", 0),
        *_levels(cfg, "decoder", "upsamples", middle),
        *_norm("decoder.head.0", "decoder.norm"),
        *_conv("decoder.head.2", "decoder.conv_out"),
    ]
