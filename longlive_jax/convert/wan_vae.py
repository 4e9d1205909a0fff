"""Names of the Wan VAE's parameters (Wan2.1 `vae.py`, Wan2.2 `vae2_2.py`), and those that diffusers
gives them (`AutoencoderKLWan`): the layouts agree.

2.1 numbers the layers of all levels in one flat list; 2.2 (the form with shortcuts) numbers levels,
and layers within.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import types
from collections.abc import Callable, Container, Mapping

from longlive_jax.config import WAN21_VAE, WAN22_VAE, VAEConfig
from longlive_jax.convert.table import CONV2D, Row

CAUSAL = (3, 4, 2, 1, 0)  # out in t h w -> h w t in out


@dataclasses.dataclass(frozen=True)
class Names:
    """How one layout calls the modules. In places, `{flat}` counts the layers of a half, `{level}`
    the resolutions, `{i}` the layers of one.
    """

    conv_in: str
    norm_out: str
    conv_out: str
    quant: tuple[str, str]  # on either side of the latents
    block: tuple[str, str, str, str, str]  # norm, convolution, norm, convolution, shortcut
    middle: tuple[str, str, str]  # block, attention, block
    down: tuple[str, str]  # place of a block, place of the resampling
    up: tuple[str, str]


_WAN = Names(
    conv_in="conv1",
    norm_out="head.0",
    conv_out="head.2",
    quant=("conv1", "conv2"),
    block=("residual.0", "residual.2", "residual.3", "residual.6", "shortcut"),
    middle=("middle.0", "middle.1", "middle.2"),
    down=("downsamples.{flat}",) * 2,
    up=("upsamples.{flat}",) * 2,
)
_DIFFUSERS = Names(
    conv_in="conv_in",
    norm_out="norm_out",
    conv_out="conv_out",
    quant=("quant_conv", "post_quant_conv"),
    block=("norm1", "conv1", "norm2", "conv2", "conv_shortcut"),
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    down=("down_blocks.{flat}",) * 2,
    up=("up_blocks.{level}.resnets.{i}", "up_blocks.{level}.upsamplers.0"),
)
NAMES = {  # by layout, and whether the levels have shortcuts
    ("wan", False): _WAN,
    ("wan", True): dataclasses.replace(
        _WAN,
        down=("downsamples.{level}.downsamples.{i}",) * 2,
        up=("upsamples.{level}.upsamples.{i}",) * 2,
    ),
    ("diffusers", False): _DIFFUSERS,
    ("diffusers", True): dataclasses.replace(
        _DIFFUSERS,
        down=("down_blocks.{level}.resnets.{i}", "down_blocks.{level}.downsampler"),
        up=("up_blocks.{level}.resnets.{i}", "up_blocks.{level}.upsampler"),
    ),
}


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


def _block(names: Names, source: str, target: str, *, widens: bool) -> list[Row]:
    norm_in, conv_in, norm_out, conv_out, shortcut = (f"{source}.{name}" for name in names.block)
    return [
        *_norm(norm_in, f"{target}.norm_in"),
        *_conv(conv_in, f"{target}.conv_in"),
        *_norm(norm_out, f"{target}.norm_out"),
        *_conv(conv_out, f"{target}.conv_out"),
        *(_point(shortcut, f"{target}.shortcut", (2, 3, 4)) if widens else []),
    ]


def _middle(cfg: VAEConfig, names: Names, side: str, start: int) -> list[Row]:
    target = f"{side}.layers"
    before, attention, after = (f"{side}.{name}" for name in names.middle)
    if not cfg.attention:  # the layers are numbered without it
        return [
            *_block(names, before, f"{target}.{start}", widens=False),
            *_block(names, attention, f"{target}.{start + 1}", widens=False),
        ]
    return [
        *_block(names, before, f"{target}.{start}", widens=False),
        *_norm(f"{attention}.norm", f"{target}.{start + 1}.norm", (1, 2)),
        *_point(f"{attention}.to_qkv", f"{target}.{start + 1}.qkv", (2, 3)),
        *_point(f"{attention}.proj", f"{target}.{start + 1}.proj", (2, 3)),
        *_block(names, after, f"{target}.{start + 2}", widens=False),
    ]


def _levels(cfg: VAEConfig, names: Names, side: str, start: int) -> list[Row]:
    down = side == "encoder"
    dims = [(cfg.encoder_dim if down else cfg.decoder_dim) * m for m in cfg.multipliers]
    strides, blocks = cfg.strides, cfg.res_blocks
    if not down:
        dims, strides, blocks = dims[::-1], strides[::-1], blocks + 1
    block, resample = names.down if down else names.up
    width, flat, rows = cfg.encoder_dim if down else dims[0], itertools.count(), []
    for level, (dim, stride) in enumerate(zip(dims, (*strides, (1, 1)), strict=True)):
        target = f"{side}.layers.{start + level}.layers"
        for i in range(blocks):
            source = f"{side}.{block.format(flat=next(flat), level=level, i=i)}"
            rows += _block(names, source, f"{target}.{i}", widens=i == 0 and width != dim)
        if stride != (1, 1):
            source = f"{side}.{resample.format(flat=next(flat), level=level, i=blocks)}"
            rows += _resample(source, f"{target}.{blocks}", stride, dim)
        halves = not down and not cfg.shortcut and stride[1] > 1
        width = dim // 2 if halves else dim
    return rows


def _rows(cfg: VAEConfig, names: Names) -> list[Row]:
    middle = 3 if cfg.attention else 2
    return [
        *_conv(f"encoder.{names.conv_in}", "encoder.conv_in"),
        *_levels(cfg, names, "encoder", 0),
        *_middle(cfg, names, "encoder", len(cfg.multipliers)),
        *_norm(f"encoder.{names.norm_out}", "encoder.norm"),
        *_conv(f"encoder.{names.conv_out}", "encoder.conv_out"),
        *_point(names.quant[0], "conv1", (2, 3, 4)),
        *_point(names.quant[1], "conv2", (2, 3, 4)),
        *_conv(f"decoder.{names.conv_in}", "decoder.conv_in"),
        *_middle(cfg, names, "decoder", 0),
        *_levels(cfg, names, "decoder", middle),
        *_norm(f"decoder.{names.norm_out}", "decoder.norm"),
        *_conv(f"decoder.{names.conv_out}", "decoder.conv_out"),
    ]


def rows(cfg: VAEConfig) -> list[Row]:
    """Official name → path in `VAE`."""
    return _rows(cfg, NAMES["wan", cfg.shortcut])


def rows_diffusers(cfg: VAEConfig) -> list[Row]:
    """Name in diffusers (and in LightVAE's files) → path in `VAE`."""
    return _rows(cfg, NAMES["diffusers", cfg.shortcut])


Shape = Callable[[str], tuple[int, ...]]


def infer(
    found: Container[str], shape: Shape, layout: str, hints: Mapping = types.MappingProxyType({})
) -> VAEConfig:
    """The config of a VAE of any size, from names and shapes in either layout ("wan", "diffusers").

    hints: what a `config.json` says. Latent statistics that it leaves out are those of the
    published VAE with as many latent channels. Raises KeyError where a name that every VAE has is
    missing.
    """
    nested = NAMES[layout, True]
    first = nested.down[0].format(level=0, i=0)
    shortcut = f"encoder.{first}.{nested.block[1]}.weight" in found
    names = NAMES[layout, shortcut]
    encoder_dim, channels, *kernel = shape(f"encoder.{names.conv_in}.weight")
    latent = shape(f"{names.quant[1]}.weight")[0]
    widths, strides, blocks = _walk(found, shape, names)
    known = {vae.latent_channels: vae for vae in (WAN21_VAE, WAN22_VAE)}.get(latent)
    return VAEConfig(
        latent_channels=latent,
        encoder_dim=encoder_dim,
        decoder_dim=shape(f"decoder.{names.norm_out}.gamma")[0],
        multipliers=tuple(width // encoder_dim for width in widths),
        res_blocks=blocks,
        strides=tuple(strides),
        patch=math.isqrt(channels // 3),
        shortcut=shortcut,
        attention=f"encoder.{names.middle[1]}.to_qkv.weight" in found,
        kernel=(kernel[0], kernel[1]),
        mean=tuple(hints.get("latents_mean") or (known.mean if known else ())),
        std=tuple(hints.get("latents_std") or (known.std if known else ())),
    )


def _walk(found: Container[str], shape: Shape, names: Names):
    """Width of every level of the encoder, its strides, and the blocks per level."""
    (block, resample), flat = names.down, itertools.count()
    widths, strides, most = [], [], 0
    for level in itertools.count():
        for i in itertools.count():
            at = dict(flat=next(flat), level=level, i=i)
            conv = f"encoder.{block.format(**at)}.{names.block[1]}.weight"
            if conv not in found:
                break
            width = shape(conv)[0]
        if i == 0:
            raise KeyError(conv)
        widths.append(width)
        most = max(most, i)
        place = f"encoder.{resample.format(**at)}"
        space, time = (f"{place}.{name}.weight" in found for name in ("resample.1", "time_conv"))
        if not (space or time):
            return widths, strides, most
        strides.append((2 if time else 1, 2 if space else 1))
