"""Names of the UMT5 encoder's parameters: Wan's checkpoint, and Hugging Face transformers'."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

from longlive_jax.config import UMT5_XXL, TextConfig
from longlive_jax.convert.table import LINEAR, Row

# Wan (`models_t5_umt5-xxl-enc-bf16.pth`), transformers (`UMT5EncoderModel`), path in `UMT5`, axes
_NAMES = [
    ("token_embedding", "shared", "token_embedding", None),
    ("norm", "encoder.final_layer_norm", "norm.scale", None),
]
_BLOCK_NAMES = [
    ("norm1", "layer.0.layer_norm", "norm_attn.scale", None),
    ("attn.q", "layer.0.SelfAttention.q", "attn.q.kernel", LINEAR),
    ("attn.k", "layer.0.SelfAttention.k", "attn.k.kernel", LINEAR),
    ("attn.v", "layer.0.SelfAttention.v", "attn.v.kernel", LINEAR),
    ("attn.o", "layer.0.SelfAttention.o", "attn.o.kernel", LINEAR),
    (
        "pos_embedding.embedding",
        "layer.0.SelfAttention.relative_attention_bias",
        "positions",
        None,
    ),
    ("norm2", "layer.1.layer_norm", "norm_ffn.scale", None),
    ("ffn.gate.0", "layer.1.DenseReluDense.wi_0", "ffn_gate.kernel", LINEAR),
    ("ffn.fc1", "layer.1.DenseReluDense.wi_1", "ffn_in.kernel", LINEAR),
    ("ffn.fc2", "layer.1.DenseReluDense.wo", "ffn_out.kernel", LINEAR),
]


def rows() -> list[Row]:
    """Wan's name → path in `UMT5`."""
    outer = [Row(f"{wan}.weight", target, axes) for wan, _, target, axes in _NAMES]
    inner = [
        Row(f"blocks.{{i}}.{wan}.weight", f"blocks.{target}", axes)
        for wan, _, target, axes in _BLOCK_NAMES
    ]
    return outer + inner


def rows_transformers() -> list[Row]:
    """Name in transformers → path in `UMT5`.

    Checkpoints that also hold `encoder.embed_tokens.weight` repeat `shared.weight` there: drop it.
    """
    outer = [Row(f"{name}.weight", target, axes) for _, name, target, axes in _NAMES]
    inner = [
        Row(f"encoder.block.{{i}}.{name}.weight", f"blocks.{target}", axes)
        for _, name, target, axes in _BLOCK_NAMES
    ]
    return outer + inner


def infer(
    found: Container[str], shape: Callable[[str], tuple[int, ...]], layout: str, hints: Mapping
) -> TextConfig:
    """The config of an encoder of any size, from names and shapes in either layout ("wan",
    "transformers").

    hints: what a `config.json` says. Raises KeyError where a name that every encoder has is
    missing.
    """
    table = {"wan": rows, "transformers": rows_transformers}[layout]()
    name = {row.target: row.source.replace("{i}", "0") for row in table}
    layer = next(row.source for row in table if row.target == "blocks.attn.q.kernel")
    layers = 0
    while layer.format(i=layers) in found:
        layers += 1
    vocab, dim = shape(name["token_embedding"])
    buckets, heads = shape(name["blocks.positions"])
    return TextConfig(
        vocab=vocab,
        dim=dim,
        attn_dim=shape(name["blocks.attn.q.kernel"])[0],
        ffn_dim=shape(name["blocks.ffn_gate.kernel"])[0],
        heads=heads,
        layers=layers,
        buckets=buckets,
        max_distance=hints.get("relative_attention_max_distance") or UMT5_XXL.max_distance,
        eps=hints.get("layer_norm_epsilon") or UMT5_XXL.eps,
    )
