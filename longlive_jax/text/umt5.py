"""The UMT5 text encoder (Wan2.2 `wan/modules/t5.py:T5Encoder`; arXiv:1910.10683, arXiv:2304.09151).

It departs from an ordinary transformer in four ways: every layer has its own table of relative
positions, logits are not divided by √d, nothing has a bias, and norms only scale. Activations keep
the dtype of the weights (float32 or bfloat16); float16 would overflow and is not supported.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from longlive_jax.config import TextConfig
from longlive_jax.layers import Linear, RMSNorm

States = Float[Array, "b l c"]
Visible = Bool[Array, "b l"]


def buckets(length: int, count: int, max_distance: int) -> np.ndarray:
    """Bucket of every query and key, int32 [length, length] (`t5.py:T5RelativeEmbedding`).

    Half of the buckets are for keys after the query. Of each half, one half holds single distances
    and the other distances in geometric steps up to `max_distance`; the last takes all beyond.
    """
    half, exact = count // 2, count // 4
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(relative)
    steps = np.arange(1, half - exact) / (half - exact)
    # Some starts are whole numbers; the margin keeps those distances in, however powers round.
    starts = exact * (max_distance / exact) ** steps - 1e-4
    far = exact + np.searchsorted(starts, distance, side="right")
    return (np.where(distance < exact, distance, far) + half * (relative > 0)).astype(np.int32)


class SelfAttention(nnx.Module):
    """Heads with logits q kᵀ + bias and a softmax in float32 (`t5.py:T5Attention`)."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        # The missing 1/√d sits in the initial queries, as in T5.
        scale = (cfg.attn_dim // cfg.heads) ** -0.5
        self.q = Linear(cfg.dim, cfg.attn_dim, bias=False, scale=scale, rngs=rngs)
        self.k, self.v = (Linear(cfg.dim, cfg.attn_dim, bias=False, rngs=rngs) for _ in range(2))
        self.o = Linear(cfg.attn_dim, cfg.dim, bias=False, rngs=rngs)
        self.heads = cfg.heads

    def __call__(self, x: States, bias: Float[Array, "a l l"], mask: Visible) -> States:
        pattern = "b l (a d) -> b a l d"
        q, k, v = (rearrange(f(x), pattern, a=self.heads) for f in (self.q, self.k, self.v))
        logits = jnp.einsum("bald,bamd->balm", q, k, preferred_element_type=jnp.float32)
        logits = logits + bias.astype(jnp.float32)
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)  # b a l l
        out = jnp.einsum("balm,bamd->bald", weights, v)
        return self.o(rearrange(out, "b a l d -> b l (a d)"))


class Block(nnx.Module):
    """Attention, then a gated-GELU MLP, each behind a norm (`t5.py:T5SelfAttention`)."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        self.norm_attn = RMSNorm(cfg.dim, eps=cfg.eps)
        self.attn = SelfAttention(cfg, rngs=rngs)
        self.norm_ffn = RMSNorm(cfg.dim, eps=cfg.eps)
        self.ffn_gate, self.ffn_in = (
            Linear(cfg.dim, cfg.ffn_dim, bias=False, rngs=rngs) for _ in range(2)
        )
        self.ffn_out = Linear(cfg.ffn_dim, cfg.dim, bias=False, rngs=rngs)
        std = (2 * cfg.buckets * cfg.heads) ** -0.5
        self.positions = nnx.Param(std * jax.random.normal(rngs.params(), (cfg.buckets, cfg.heads)))

    def __call__(self, x: States, table: Int[Array, "l l"], mask: Visible) -> States:
        x = x + self.attn(self.norm_attn(x), self.bias(table), mask)
        h = self.norm_ffn(x)
        return x + self.ffn_out(self.ffn_in(h) * jax.nn.gelu(self.ffn_gate(h), approximate=True))

    def bias(self, table: Int[Array, "l m"]) -> Float[Array, "a l m"]:
        """What this layer adds to its logits; table holds the buckets of queries l and keys m."""
        return jnp.moveaxis(self.positions[...][table], -1, 0)


class UMT5(nnx.Module):
    """Encoder of token ids. Weights only; blocks are stacked along a leading layer axis."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        self.token_embedding = nnx.Param(jax.random.normal(rngs.params(), (cfg.vocab, cfg.dim)))
        keys = jax.random.split(rngs.params(), cfg.layers)
        self.blocks = nnx.vmap(lambda key: Block(cfg, rngs=nnx.Rngs(key)))(keys)
        self.norm = RMSNorm(cfg.dim, eps=cfg.eps)
        self.cfg = cfg

    def __call__(self, ids: Int[Array, "b l"], mask: Visible) -> States:
        """States of all positions; those outside the mask are not attended but hold values."""
        cfg = self.cfg
        table = jnp.asarray(buckets(ids.shape[1], cfg.buckets, cfg.max_distance))
        x = self.token_embedding[...][ids]  # b l c

        def body(x, block):
            return block(x, table, mask), None

        x, _ = jax.lax.scan(body, x, self.blocks)
        return self.norm(x)


def encode(
    umt5: UMT5, ids: Int[Array, "b l"], mask: Bool[Array, "b l"] | Int[Array, "b l"]
) -> Float[Array, "b l d"]:
    """Embeddings of prompts, zero where `mask` is (`wan_wrapper.py:WanTextEncoder`).

    The zero rows are part of the prompt's meaning: the transformer was trained to attend them.
    """
    mask = mask.astype(bool)
    x = umt5(ids, mask)
    return jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))
