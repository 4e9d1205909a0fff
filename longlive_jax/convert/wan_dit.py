"""Names of the Wan transformer's parameters (Wan2.1, Wan2.2, LongLive: all the same)."""

from __future__ import annotations

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
