"""LongLive 1.0's two stages: python experiments/long_tuning.py --workdir=runs/NAME
--config=experiments/configs/long_wan.py:WHICH --config.prompts.file=FILE

init: the 1.3B learns single clips of 21 latents in four steps, all of its weights
(`configs/longlive_train_init.yaml`). long: a LoRA of rank 256 on videos of 237 latents, with a
switch of prompt on the way (`configs/longlive_train_long.yaml`); it begins with what init made, as
`export_run.py --workdir runs/init --output wan-1.3b-init` writes it. Teacher and critic are
bidirectional models; the teacher may be larger (`wan-14b`).
"""

import ml_collections

ADAMW = dict(
    b1=0.0, b2=0.999, weight_decay=0.01, warmup=0, decay=0.0, floor=1.0, ema=0.99, ema_start=200
)
BASE = "wan-1.3b"


def get_config(which: str = "long") -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(_run(**CHANGES[which]))


def _run(
    model: str, clips: dict, prompts: dict, rank: int, rates: tuple[float, float], steps: int
) -> dict:
    student, fake = rates
    return dict(
        model=model,
        teacher="wan-14b",
        critic=BASE,
        steps=4,
        seed=0,
        data=8,
        fsdp=8,
        prompts=dict(file="prompts.jsonl", batch=64, seed=0) | prompts,
        clips=clips,
        # Their bidirectional models look timesteps up in a table of shift 8.
        judge=dict(causal=False, whole=True, score_shift=8.0, real_guidance=3.0),
        student=dict(rank=rank, learning_rate=student, steps=steps, clip=10.0) | ADAMW,
        fake=dict(rank=rank, learning_rate=fake, steps=steps, clip=10.0) | ADAMW,
        # The memory's gradient is that of the exit step, as in the released code.
        through="straight",
        precision=dict(student="", teacher="", critic=""),  # of frozen weights
        every=5,
        attention="best",
        dtype="bfloat16",
        log_every=10,
        save_every=100,
        sample_every=100,
        sample_prompts=("a red fox runs through a snowy forest at dawn",),
        sample_seconds=30.0,
    )


CHANGES = {
    "init": dict(
        model=BASE,
        clips=dict(first=7, next=7, length=7, newest=True),
        prompts={},
        rank=0,
        rates=(2e-6, 4e-7),
        steps=700,
    ),
    # 18 new latents to every clip; the switch at 21, 39, …, 201 latents.
    "long": dict(
        model=f"{BASE}-init",
        clips=dict(first=7, next=6, length=80, newest=True),
        prompts=dict(switch=(7, 67, 6)),
        rank=256,
        rates=(1e-5, 2e-6),
        steps=3000,
    ),
}
