"""LongLive 2.0's distillation: python experiments/distill_dmd.py --workdir=runs/NAME
--config=experiments/configs/dmd_wan.py:WHICH --config.prompts.file=FILE

5b-4, 5b-2: the 5B in 4 and in 2 steps, by LoRAs of rank 128 on student and critic, clips of 32
latents in shots of 2 chunks (appendix I, `train_dmd_nvfp4_step4.yaml`), on 16 GPUs, two on each;
on eight, one on each: --config.data=1 --config.prompts.batch=8. Model, critic and teacher are the
folder `wan-5b`, made by `longlive convert`; the LoRA is then loaded onto an AR model of the same
base. nvfp4: the same with frozen weights in four bits, but for the critic's.
"""

import ml_collections

ADAMW = dict(b1=0.0, b2=0.999, weight_decay=0.01, warmup=0, decay=0.0, floor=1.0, clip=10.0)


def get_config(which: str = "5b-4") -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(_run(**CHANGES[which]))


def _run(steps: int, precision: dict | None = None) -> dict:
    return dict(
        model="wan-5b",
        steps=steps,
        seed=0,
        data=2,
        fsdp=8,
        prompts=dict(file="prompts.jsonl", batch=32, shot=2, seed=0),
        clips=dict(first=4, next=4, length=4),
        judge=dict(real_guidance=3.0),
        student=dict(rank=128, learning_rate=1e-5, steps=5000, ema=0.99, ema_start=200) | ADAMW,
        fake=dict(rank=128, learning_rate=2e-6, steps=5000) | ADAMW,
        every=5,
        attention="best",
        precision=dict(student="", teacher="", critic="") | (precision or {}),
        dtype="bfloat16",
        log_every=10,
        save_every=200,
        sample_every=200,
        sample_prompts=("a red fox runs through a snowy forest at dawn",),
    )


NVFP4 = dict(student="nvfp4", teacher="nvfp4")
CHANGES = {
    "5b-4": dict(steps=4),
    "5b-2": dict(steps=2),
    "5b-4-nvfp4": dict(steps=4, precision=NVFP4),
    "5b-2-nvfp4": dict(steps=2, precision=NVFP4),
}
