"""The tiny model on videos of the toy world: python experiments/train_ar.py --workdir=runs/NAME
--config=experiments/configs/ar_toy.py:WHICH

tune (also without a name): the model that ships goes on, on long multi-shot videos;
    --config.source.folder=runs/toy, of make_toy_folder.py --samples 400 --chunks 16.
recycled, nvfp4: the same with error recycling; with NVFP4 products.
clip: a new model of short clips, all of whose frames see each other; no stream can be made of it.
    --config.source.folder=runs/clips, of make_toy_folder.py --samples 3000 --chunks 4 --cuts 0.
direct: that model, exported to runs/clip_model, becomes one of long videos. With
    --config.fresh=True from random weights instead.
"""

import ml_collections

# A sequence of this many latent frames is a clip of 45 frames, 2.8 s.
CLIP = 12


def get_config(which: str = "tune") -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(_run(**CHANGES[which]))


def _run(source: dict | None = None, ar: dict | None = None, **changes) -> dict:
    folder = dict(
        folder="runs/toy", chunks=16, batch=4, cache="runs/latents", start="first", seed=0
    )
    noise = dict(context_sigma=0.25, context_share=0.7)
    task = dict(shift=3.0, windowed=True, remat="all", attention="best") | noise
    run = dict(
        model="tiny",
        fresh=False,
        seed=0,
        data=1,
        fsdp=1,
        seq=1,
        source=folder | (source or {}),
        ar=task | (ar or {}),
        optimizer=dict(learning_rate=1e-4, steps=200, warmup=10, decay=0.5, ema=0.99),
        recycling=ml_collections.config_dict.placeholder(dict),
        nvfp4=ml_collections.config_dict.placeholder(dict),
        dtype="float32",
        log_every=10,
        save_every=50,
        sample_every=0,
        sample_prompts=("a red circle moves left over a black background",),
    )
    return run | changes


# What learned the model that ships, with fewer steps.
MUON = dict(kind="muon", learning_rate=0.01, warmup=20, decay=0.6, ema=0.99)

CHANGES = {
    "tune": {},
    "nvfp4": dict(nvfp4={}),  # the recipe of LongLive 2.0
    "recycled": dict(recycling=dict(buckets=10, size=100, positions=16)),
    "clip": dict(
        fresh=True,
        source=dict(folder="runs/clips", chunks=1, batch=16),
        ar=dict(stream=dict(chunk=CLIP, window=CLIP, sink=0)),
        optimizer=MUON | dict(steps=600),
    ),
    "direct": dict(
        model="runs/clip_model",
        ar=dict(stream=dict(chunk=3, window=12, sink=3)),
        optimizer=MUON | dict(steps=400),
    ),
}
