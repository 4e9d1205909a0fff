"""The tiny VAE: short clips of the toy world, Muon."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        dict(
            seed=0,
            batch=8,
            chunks=2,  # of three latents: clips of 21 frames
            things=0.25,  # share of clips with two shapes
            model=dict(),  # fields of TINY_VAE to replace
            optimizer=dict(learning_rate=0.01, steps=1500, decay=0.5, ema=0.99),
            loss=dict(squared=4.0, kl=5e-4),
            log_every=50,
            save_every=100,
        )
    )
