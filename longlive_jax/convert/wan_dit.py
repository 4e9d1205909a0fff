"""Names of the Wan transformer's parameters (Wan2.1, Wan2.2, LongLive: all the same), and those
that diffusers gives them (`scripts/convert_wan_to_diffusers.py`): the layouts agree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container, Mapping

from longlive_jax.config import DiTConfig
from longlive_jax.convert.table import LINEAR, Row


def _affine(source: str, target: str) -> list[Row]:
    return [
        Row(f"{source}.weight", f"{target}.kernel", LINEAR),
        Row(f"{source}.bias", f"{target}.bias"),
    ]


def _attention(kind: str) -> list[Row]:
    source, target = f"blocks.{{i}}.{kind}", f"blocks.{kind}"
    rows = [row for part in "qkvo" for row in _affine(f"{source}.{part}", f"{target}.{part}")]
    norms = [Row(f"{source}.{n}.weight", f"{target}.{n}.scale") for n in ("norm_q", "norm_k")]
    return rows + norms


def rows(cfg: DiTConfig) -> list[Row]:
    """Official name → path in `DiT`."""
    merge = (*cfg.patch, cfg.channels)  # out c p q r -> (p q r c) out
    patch = Row("patch_embedding.weight", "patch_embedding.kernel", (2, 3, 4, 1, 0), merge=merge)
    return [
        patch,
        Row("patch_embedding.bias", "patch_embedding.bias"),
        *_affine("text_embedding.0", "text_in"),
        *_affine("text_embedding.2", "text_out"),
        *_affine("time_embedding.0", "time_in"),
        *_affine("time_embedding.2", "time_out"),
        *_affine("time_projection.1", "time_projection"),
        *_attention("self_attn"),
        *_attention("cross_attn"),
        Row("blocks.{i}.norm3.weight", "blocks.norm.scale"),
        Row("blocks.{i}.norm3.bias", "blocks.norm.bias"),
        *_affine("blocks.{i}.ffn.0", "blocks.ffn_in"),
        *_affine("blocks.{i}.ffn.2", "blocks.ffn_out"),
        Row("blocks.{i}.modulation", "blocks.modulation", squeeze=(0,)),
        *_affine("head.head", "head"),
        Row("head.modulation", "head_modulation", squeeze=(0,)),
    ]


# Module by module: Wan's name, diffusers' name. Its norm2 is Wan's norm3, and the other way round.
_DIFFUSERS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "blocks.{i}.self_attn.q": "blocks.{i}.attn1.to_q",
    "blocks.{i}.self_attn.k": "blocks.{i}.attn1.to_k",
    "blocks.{i}.self_attn.v": "blocks.{i}.attn1.to_v",
    "blocks.{i}.self_attn.o": "blocks.{i}.attn1.to_out.0",
    "blocks.{i}.self_attn.norm_q": "blocks.{i}.attn1.norm_q",
    "blocks.{i}.self_attn.norm_k": "blocks.{i}.attn1.norm_k",
    "blocks.{i}.cross_attn.q": "blocks.{i}.attn2.to_q",
    "blocks.{i}.cross_attn.k": "blocks.{i}.attn2.to_k",
    "blocks.{i}.cross_attn.v": "blocks.{i}.attn2.to_v",
    "blocks.{i}.cross_attn.o": "blocks.{i}.attn2.to_out.0",
    "blocks.{i}.cross_attn.norm_q": "blocks.{i}.attn2.norm_q",
    "blocks.{i}.cross_attn.norm_k": "blocks.{i}.attn2.norm_k",
    "blocks.{i}.norm3": "blocks.{i}.norm2",
    "blocks.{i}.ffn.0": "blocks.{i}.ffn.net.0.proj",
    "blocks.{i}.ffn.2": "blocks.{i}.ffn.net.2",
    "head.head": "proj_out",
}
_DIFFUSERS_WHOLE = {
    "blocks.{i}.modulation": "blocks.{i}.scale_shift_table",
    "head.modulation": "scale_shift_table",
}


def rows_diffusers(cfg: DiTConfig) -> list[Row]:
    """Name in diffusers (`WanTransformer3DModel`) → path in `DiT`."""
    return [dataclasses.replace(row, source=_diffusers(row.source)) for row in rows(cfg)]


def _diffusers(name: str) -> str:
    if name in _DIFFUSERS_WHOLE:
        return _DIFFUSERS_WHOLE[name]
    module, _, leaf = name.rpartition(".")
    return f"{_DIFFUSERS[module]}.{leaf}"


_ANY = DiTConfig(dim=1, ffn_dim=1, heads=1, layers=1, channels=1, text_dim=1, text_len=512)
_HEAD_WIDTH = 128  # of every published Wan transformer
_IMAGE = {  # what only a transformer that is shown an image has
    "wan": ("img_emb.proj.0.weight", "blocks.0.cross_attn.k_img.weight"),
    "diffusers": (
        "condition_embedder.image_embedder.norm1.weight",
        "blocks.0.attn2.add_k_proj.weight",
    ),
}


def infer(
    found: Container[str], shape: Callable[[str], tuple[int, ...]], layout: str, hints: Mapping
) -> DiTConfig:
    """The config of a transformer of any size, from names and shapes in either layout ("wan",
    "diffusers").

    hints: what a `config.json` says; only it can tell the number of heads where they are not
    128 wide, and the text length.

    Raises:
      KeyError: a name that every transformer has is missing.
      NotImplementedError: an image is among its inputs.
    """
    table = {"wan": rows, "diffusers": rows_diffusers}[layout](_ANY)
    name = {row.target: row.source.replace("{i}", "0") for row in table}
    dim, channels, *patch = shape(name["patch_embedding.kernel"])
    outputs = shape(name["head.kernel"])[0]
    # Wan's image lies in channels beside the noisy ones: more go in than come out.
    if outputs < math.prod(patch) * channels or any(sign in found for sign in _IMAGE[layout]):
        raise NotImplementedError("is an image-to-video model")
    layer = next(row.source for row in table if row.target == "blocks.modulation")
    layers = 0
    while layer.format(i=layers) in found:
        layers += 1
    heads = hints.get("num_heads") or hints.get("num_attention_heads")
    return DiTConfig(
        dim=dim,
        ffn_dim=shape(name["blocks.ffn_in.kernel"])[0],
        heads=heads or max(dim // _HEAD_WIDTH, 1),
        layers=layers,
        channels=channels,
        text_dim=shape(name["text_in.kernel"])[1],
        text_len=hints.get("text_len") or _ANY.text_len,
        freq_dim=shape(name["time_in.kernel"])[1],
        patch=(patch[0], patch[1], patch[2]),
        eps=hints.get("eps") or _ANY.eps,
    )
