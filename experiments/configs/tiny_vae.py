"""The tiny VAE: short clips of the toy world, Muon, from a linear start."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        dict(
            seed=0,
            batch=8,
            frames=13,  # of a clip: four latents, the last with all of its context
            two_things=0.25,  # share of clips with two shapes
            optimizer=dict(learning_rate=0.002, warmup=20, steps=900, decay=0.6, ema=0.98),
            loss=dict(squared=4.0, kl=5e-4),
            log_every=25,
            save_every=100,
        )
    )
