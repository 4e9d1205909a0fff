"""The tiny model in fewer steps: python experiments/distill_dmd.py --workdir=runs/NAME
--config=experiments/configs/dmd_toy.py:WHICH

steps4, steps2: a LoRA for so many steps. full4, full2: all weights.
Prompts are those of make_toy_prompts.py --output runs/prompts.jsonl.
"""

import ml_collections

ADAMW = dict(b1=0.0, b2=0.999, weight_decay=0.0, warmup=5, decay=0.3)


def get_config(which: str = "steps4") -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(_run(**CHANGES[which]))


def _run(steps: int, rank: int = 32) -> dict:
    return dict(
        model="tiny",
        steps=steps,
        seed=0,
        data=1,
        fsdp=1,
        prompts=dict(file="runs/prompts.jsonl", batch=8, seed=0),
        # A clip is 12 latents, 2.8 s.
        clips=dict(first=4, next=4, length=4),
        # The tiny model has no guidance; a little helps it to forms that it is not sure of.
        judge=dict(real_guidance=1.0),
        student=dict(rank=rank, learning_rate=3e-4, steps=300, ema=0.95) | ADAMW,
        fake=dict(rank=rank, learning_rate=3e-4, steps=300) | ADAMW,
        precision=dict(student="", teacher="", critic=""),  # of frozen weights
        through="stop",
        every=5,
        attention="best",
        dtype="float32",
        log_every=10,
        save_every=50,
    )


CHANGES = {
    "steps4": dict(steps=4),
    "steps2": dict(steps=2),
    "full4": dict(steps=4, rank=0),
    "full2": dict(steps=2, rank=0),
}
