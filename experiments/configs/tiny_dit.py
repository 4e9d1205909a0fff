"""The tiny transformer: teacher forcing on latents of the toy world."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        dict(
            seed=0,
            batch=12,
            optimizer=dict(kind="muon", learning_rate=0.01, steps=1700, decay=0.75),
            corruption=dict(shift=3.0),
            sequence=dict(),
            log_every=50,
            save_every=200,
        )
    )
