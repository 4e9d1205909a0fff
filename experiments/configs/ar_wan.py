"""Wan into a long, multi-shot, autoregressive model: LongLive 2.0, appendix I.

python experiments/train_ar.py --config=experiments/configs/ar_wan.py:5b-64 --workdir=runs/ar_5b
    --config.model=wan22-5b --config.source.folder=videos --cluster

5b or 1.3b, and the seconds of a sequence: 16, 32 or 64; -nvfp4 after them (5b-64-nvfp4) has NVFP4
products. The paper trains the 5B on 32 GB200, sequences spread over 4, weights over all, 600 steps
of 16 videos. On a cluster every process runs this command (`srun`, `mpirun`, or a pod of a
Kubernetes job).
"""

import ml_collections

# Chunks of a sequence: 32 frames at 24 FPS; 12 frames at 16 FPS, rounded up to divide over 4 ranks.
CHUNKS = {
    "5b": {"16": 12, "32": 24, "64": 48},
    "1.3b": {"16": 24, "32": 44, "64": 88},
}
MESH = {
    "5b": dict(data=1, fsdp=8, seq=4),
    "1.3b": dict(data=1, fsdp=2, seq=4),
}


def get_config(which: str = "5b-16") -> ml_collections.ConfigDict:
    size, seconds, *products = which.split("-")
    chunks, mesh = CHUNKS[size][seconds], MESH[size]
    batch = mesh["data"] * mesh["fsdp"]
    source = dict(folder="videos", chunks=chunks, batch=batch, parts=16 // batch, shot=4, workers=4)
    optimizer = dict(learning_rate=1e-5, steps=600, warmup=0, decay=0.0, floor=1.0, clip=10.0)
    optimizer |= dict(b1=0.0, b2=0.999, weight_decay=0.01, ema=0.99, ema_start=100)
    return ml_collections.ConfigDict(
        dict(
            model=f"wan-{size}",
            seed=0,
            **mesh,
            source=source,
            ar=dict(shift=5.0, attention="best"),
            optimizer=optimizer,
            recycling=dict(),  # the paper's values
            nvfp4={} if products == ["nvfp4"] else ml_collections.config_dict.placeholder(dict),
            dtype="bfloat16",
            log_every=1,
            save_every=50,
            sample_every=100,
            sample_prompts=("a red fox runs through a snowy forest at dawn",),
        )
    )
