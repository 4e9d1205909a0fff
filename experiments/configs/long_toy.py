"""The tiny model on its own long videos: python experiments/long_tuning.py --workdir=runs/NAME
--config=experiments/configs/long_toy.py:WHICH

switch: one change of prompt on the way (also without a name). plain: none. The teacher is the tiny
model itself, or a bidirectional one of clips: --config.teacher=runs/clip_model
--config.judge.causal=False. Prompts are those of make_toy_prompts.py --output runs/prompts.jsonl.
"""

import ml_collections

ADAMW = dict(b1=0.0, b2=0.999, weight_decay=0.0, warmup=5, decay=0.3)


def get_config(which: str = "switch") -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(_run(**CHANGES[which]))


def _run(switch: tuple[int, int, int] | None) -> dict:
    return dict(
        model="tiny",
        teacher="",
        critic="",
        steps=4,
        seed=0,
        data=1,
        fsdp=1,
        prompts=dict(file="runs/prompts.jsonl", batch=8, switch=switch, seed=0),
        # Clips of 12 latents, of which 9 are new, up to a minute.
        clips=dict(first=4, next=3, length=79, newest=True),
        judge=dict(real_guidance=1.0),
        student=dict(rank=32, learning_rate=3e-4, steps=300, ema=0.95) | ADAMW,
        fake=dict(rank=32, learning_rate=3e-4, steps=300) | ADAMW,
        precision=dict(student="", teacher="", critic=""),  # of frozen weights
        through="stop",
        every=5,
        attention="best",
        dtype="float32",
        log_every=10,
        save_every=50,
    )


# Where a clip begins, between the fifth second and the fifth from the end.
CHANGES = {"switch": dict(switch=(7, 70, 3)), "plain": dict(switch=None)}
