"""The tiny model, tuned on long multi-shot videos of the toy world.

python experiments/make_toy_folder.py --output runs/toy --samples 64 --chunks 16 first.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        dict(
            model="tiny",
            seed=0,
            data=1,
            fsdp=1,
            seq=1,
            source=dict(
                folder="runs/toy", chunks=16, batch=2, cache="runs/toy_latents", start="first"
            ),
            ar=dict(shift=3.0, context_sigma=0.25, context_share=0.7, windowed=True),
            optimizer=dict(learning_rate=1e-4, steps=200, warmup=10, decay=0.5, ema=0.99),
            recycling=ml_collections.config_dict.placeholder(dict),
            dtype="float32",
            log_every=10,
            save_every=50,
            sample_every=0,
            sample_prompts=("a red circle moves left over a black background",),
        )
    )
