"""Names of TAEHV's parameters (`taehv.py:TAEHV`), which numbers the layers of either half.

The numbers count the layers without parameters too: activations, the clamp, the upsampling.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

from longlive_jax.config import TAEConfig
from longlive_jax.convert.source import spec_of
from longlive_jax.convert.table import CONV2D, Row

# The first convolution, the poolings, and the decoder's convolutions that change the width.
_TELLING = (
    *("encoder.0", "encoder.2.conv", "encoder.7.conv", "encoder.12.conv"),
    *("decoder.1", "decoder.8", "decoder.14", "decoder.20"),
)
_POINT = dict(axes=(1, 0), squeeze=(2, 3))  # out in 1 1 -> in out


def _conv(source: str, target: str) -> list[Row]:
    return [
        Row(f"{source}.weight", f"{target}.kernel", CONV2D),
        Row(f"{source}.bias", f"{target}.bias"),
    ]


def _block(source: str, target: str) -> list[Row]:
    return [row for i in range(3) for row in _conv(f"{source}.conv.{2 * i}", f"{target}.convs.{i}")]


def _resample(point: str, conv: str, target: str) -> list[Row]:
    return [
        Row(f"{point}.conv.weight", f"{target}.time_conv.kernel", **_POINT),
        Row(f"{conv}.weight", f"{target}.space_conv.kernel", CONV2D),
    ]


def _encoder(cfg: TAEConfig) -> list[Row]:
    rows, number, layer = _conv("encoder.0", "encoder.conv_in"), 2, 0
    for _ in cfg.strides:
        pool, conv = f"encoder.{number}", f"encoder.{number + 1}"
        rows += _resample(pool, conv, f"encoder.layers.{layer}")
        for i in range(cfg.blocks):
            rows += _block(f"encoder.{number + 2 + i}", f"encoder.layers.{layer + 1 + i}")
        number, layer = number + 2 + cfg.blocks, layer + 1 + cfg.blocks
    return rows + _conv(f"encoder.{number}", "encoder.conv_out")


def _decoder(cfg: TAEConfig) -> list[Row]:
    rows, number, layer = _conv("decoder.1", "decoder.conv_in"), 3, 0
    for _ in cfg.strides:
        for i in range(cfg.blocks):
            rows += _block(f"decoder.{number + i}", f"decoder.layers.{layer + i}")
        number, layer = number + cfg.blocks, layer + cfg.blocks
        grow, conv = f"decoder.{number + 1}", f"decoder.{number + 2}"
        rows += _resample(grow, conv, f"decoder.layers.{layer}")
        number, layer = number + 3, layer + 1
    return rows + _conv(f"decoder.{number + 1}", "decoder.conv_out")


def rows(cfg: TAEConfig) -> list[Row]:
    """Official name → path in `TAE`."""
    return _encoder(cfg) + _decoder(cfg)


def matches(found: Container[str]) -> bool:
    """Whether these are a TAEHV's names."""
    return all(f"{name}.weight" in found for name in (*_TELLING, "decoder.3.conv.0"))


def config(tensors: Mapping) -> TAEConfig:
    """The shape of a TAEHV, from the shapes of its tensors. (The reference goes by the file's
    name.) Raises KeyError where one that every TAEHV has is missing.
    """
    of = {name: spec_of(tensors, f"{name}.weight").shape for name in _TELLING}
    pools = (of[name] for name in _TELLING[1:4])
    return TAEConfig(
        latent_channels=of["decoder.1"][1],
        patch=math.isqrt(of["encoder.0"][1] // 3),
        encoder_dim=of["encoder.0"][0],
        decoder_dims=tuple(of[name][0] for name in _TELLING[4:]),
        strides=tuple((inputs // outputs, 2) for outputs, inputs, *_ in pools),
    )
