"""The module that a VAE's config describes."""

from __future__ import annotations

from flax import nnx

from longlive_jax.config import TAEConfig, VAEConfig
from longlive_jax.vae.tae import TAE
from longlive_jax.vae.vae import VAE

_KINDS = {VAEConfig: VAE, TAEConfig: TAE}


def build(cfg: VAEConfig | TAEConfig, *, rngs: nnx.Rngs) -> VAE | TAE:
    """A VAE of either kind, with fresh weights. What `vae.stream` and its like do with it follows
    from its type.
    """
    return _KINDS[type(cfg)](cfg, rngs=rngs)
