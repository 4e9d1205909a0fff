"""The Wan diffusion transformer, written once (Wan2.2 `wan/modules/model.py:WanModel`).

Teacher forcing, streaming, recaching and bidirectional models all run this forward; they differ in
the `attn` passed in.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from longlive_jax.config import DiTConfig
from longlive_jax.dit.timestep import sinusoid
from longlive_jax.layers import LayerNorm, Linear, RMSNorm, layer_norm


@runtime_checkable
class Attn(Protocol):
    """See `dit.attention`."""

    def __call__(self, q: Array, k: Array, v: Array, state: Any) -> tuple[Array, Any]: ...

    def text(self, q: Array, k: Array, v: Array) -> Array:
        """Prompts b s l a d, attended by the s segments of a sequence, b s n a d."""

    def spread(self, x: Array) -> Array:
        """Says where a block's tokens, and their gradients, lie on several devices: left to itself,
        XLA gathers tokens where weights are spread, although these are fewer.
        """


Tokens = Float[Array, "b n e"]
# What a block keeps for its gradient; what it does not keep is computed again.
REMAT = {
    "all": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextKV:
    """Cross-attention keys and values of every layer, computed once per prompt.

    The tokens of a sequence are cut into `s` equal segments, and segment i attends prompt i; or the
    prompt that `segment` names, where there are fewer prompts than segments.
    """

    k: Float[Array, "*layers b p l a d"]
    v: Float[Array, "*layers b p l a d"]
    segment: Int[Array, "*layers b s"] | None = None

    def of_segments(self) -> tuple[Array, Array]:
        """Keys and values of one layer, b s l a d. Whole prompts are picked: their gradient is a
        few large additions.
        """
        if self.segment is None:
            return self.k, self.v
        pick = jax.vmap(lambda x, segment: x[segment])
        return pick(self.k, self.segment), pick(self.v, self.segment)


def modulate(x: Tokens, shift: Float[Array, "b m e"], scale: Float[Array, "b m e"]) -> Tokens:
    """x * (1 + scale) + shift, each of the m conditions covering n / m neighbouring tokens."""
    y = _grouped(x, shift.shape[1]) * (1 + scale[:, :, None]) + shift[:, :, None]
    return y.reshape(x.shape)


def gate(x: Tokens, factor: Float[Array, "b m e"]) -> Tokens:
    return (_grouped(x, factor.shape[1]) * factor[:, :, None]).reshape(x.shape)


def _grouped(x: Tokens, groups: int) -> Float[Array, "b m s e"]:
    return x.reshape(x.shape[0], groups, -1, x.shape[-1])


class Projections(nnx.Module):
    """q, k, v, o with RMSNorm over the full width of q and k, before the split into heads."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.q, self.k, self.v = (Linear(cfg.dim, cfg.dim, rngs=rngs) for _ in range(3))
        self.o = Linear(cfg.dim, cfg.dim, rngs=rngs)
        self.norm_q, self.norm_k = RMSNorm(cfg.dim, eps=cfg.eps), RMSNorm(cfg.dim, eps=cfg.eps)
        self.heads = cfg.heads

    def queries(self, x: Array) -> Array:
        return rearrange(self.norm_q(self.q(x)), "... (a d) -> ... a d", a=self.heads)

    def keys(self, x: Array) -> Array:
        return rearrange(self.norm_k(self.k(x)), "... (a d) -> ... a d", a=self.heads)

    def values(self, x: Array) -> Array:
        return rearrange(self.v(x), "... (a d) -> ... a d", a=self.heads)

    def out(self, x: Array) -> Array:
        return self.o(rearrange(x, "... a d -> ... (a d)"))


class Block(nnx.Module):
    """Self-attention, cross-attention and MLP, modulated by the timestep
    (`model.py:WanAttentionBlock`).
    """

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.self_attn = Projections(cfg, rngs=rngs)
        self.cross_attn = Projections(cfg, rngs=rngs)
        self.norm = LayerNorm(cfg.dim, eps=cfg.eps)
        self.ffn_in = Linear(cfg.dim, cfg.ffn_dim, rngs=rngs)
        self.ffn_out = Linear(cfg.ffn_dim, cfg.dim, rngs=rngs)
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, cfg.dim)) / cfg.dim**0.5)
        self.eps = cfg.eps

    def __call__(
        self, x: Tokens, time: Float[Array, "b m 6 e"], text: TextKV, attn: Attn, state: Any
    ) -> tuple[Tokens, Any]:
        shift, scale, open_, shift2, scale2, open2 = jnp.moveaxis(time + self.modulation[...], 2, 0)
        h = modulate(layer_norm(x, self.eps), shift, scale)  # b n e
        p = self.self_attn
        h, state = attn(p.queries(h), p.keys(h), p.values(h), state)
        x = x + gate(p.out(h), open_)
        x = x + self._cross(self.norm(x), text, attn)
        h = modulate(layer_norm(x, self.eps), shift2, scale2)
        h = self.ffn_out(jax.nn.gelu(self.ffn_in(h), approximate=True))
        return x + gate(h, open2), state

    def _cross(self, x: Tokens, text: TextKV, attn: Attn) -> Tokens:
        k, v = text.of_segments()
        q = self.cross_attn.queries(_grouped(x, k.shape[1]))  # b s n a d
        return self.cross_attn.out(attn.text(q, k, v)).reshape(x.shape)

    def text_kv(self, text: Float[Array, "b s l c"]) -> TextKV:
        return TextKV(self.cross_attn.keys(text), self.cross_attn.values(text))


class DiT(nnx.Module):
    """Velocity of noisy latents. Weights only; blocks are stacked along a leading layer axis."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        patch = int(np.prod(cfg.patch)) * cfg.channels
        self.patch_embedding = Linear(patch, cfg.dim, rngs=rngs)
        self.text_in = Linear(cfg.text_dim, cfg.dim, rngs=rngs)
        self.text_out = Linear(cfg.dim, cfg.dim, rngs=rngs)
        self.time_in = Linear(cfg.freq_dim, cfg.dim, rngs=rngs)
        self.time_out = Linear(cfg.dim, cfg.dim, rngs=rngs)
        self.time_projection = Linear(cfg.dim, 6 * cfg.dim, rngs=rngs)
        keys = jax.random.split(rngs.params(), cfg.layers)
        self.blocks = nnx.vmap(lambda key: Block(cfg, rngs=nnx.Rngs(key)))(keys)
        self.head = Linear(cfg.dim, patch, scale=0.0, rngs=rngs)
        self.head_modulation = nnx.Param(
            jax.random.normal(rngs.params(), (2, cfg.dim)) / cfg.dim**0.5
        )
        self.cfg = cfg

    def __call__(
        self,
        latents: Float[Array, "b f h w c"],
        t: Float[Array, "b m"],
        text: TextKV,
        attn: Attn,
        state: Any = None,
        *,
        remat: str = "dots",
    ) -> tuple[Float[Array, "b f h w c"], Any]:
        """Velocity and the state that `attn` leaves.

        t: timesteps in 0 … 1000; m is 1, the number of latent frames, or the number of tokens.
        remat: what a block keeps for its gradient, one of `REMAT`.
        """
        grid = tuple(n // p for n, p in zip(latents.shape[1:4], self.cfg.patch, strict=True))
        x = self.patch_embedding(self.patchify(latents))  # b n e
        time = self.time_embedding(t)  # b m e
        projected = self.time_projection(jax.nn.silu(time))
        projected = rearrange(projected, "b m (six e) -> b m six e", six=6)

        @functools.partial(jax.checkpoint, policy=REMAT[remat])
        def body(carry, layer):
            block, kv = layer
            return block(attn.spread(carry[0]), projected, kv, attn, carry[1]), None

        (x, state), _ = jax.lax.scan(body, (x, state), (self.blocks, text))
        shift, scale = jnp.moveaxis(time[:, :, None] + self.head_modulation[...], 2, 0)
        x = self.head(modulate(layer_norm(x, self.cfg.eps), shift, scale))
        return self.unpatchify(x, grid), state

    def time_embedding(self, t: Float[Array, "b m"]) -> Float[Array, "b m e"]:
        h = sinusoid(t, self.cfg.freq_dim).astype(self.time_in.kernel[...].dtype)
        return self.time_out(jax.nn.silu(self.time_in(h)))

    def text_kv(self, text: Float[Array, "b s l c"]) -> TextKV:
        """Cross-attention keys and values of encoded prompts, zero rows included (they are
        attended).
        """
        h = self.text_out(jax.nn.gelu(self.text_in(text), approximate=True))
        return jax.lax.map(lambda block: block.text_kv(h), self.blocks)

    def patchify(self, latents: Float[Array, "b f h w c"]) -> Float[Array, "b n p"]:
        p, q, r = self.cfg.patch
        return rearrange(latents, "b (f p) (h q) (w r) c -> b (f h w) (p q r c)", p=p, q=q, r=r)

    def unpatchify(
        self, x: Float[Array, "b n p"], grid: tuple[int, int, int]
    ) -> Float[Array, "b f h w c"]:
        (f, h, w), (p, q, r) = grid, self.cfg.patch
        pattern = "b (f h w) (p q r c) -> b (f p) (h q) (w r) c"
        return rearrange(x, pattern, f=f, h=h, w=w, p=p, q=q, r=r)
