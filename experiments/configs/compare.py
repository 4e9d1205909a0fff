"""What `compare.py` compares: python experiments/compare.py --output runs/NAME
--config=experiments/configs/compare.py:WHICH

low_bits: as Table 7 of the LongLive 2.0 paper, with runs/bf_S_model and runs/nv_S_model, which
train_ar.py tuned for as many steps without and with NVFP4 products. clean_pass: with it, and with
what the last step left in its place. scores: of keys that are unpacked, and of keys as they are
kept. few_steps: with the LoRAs of distill_dmd.py in runs/dmd4_S and runs/dmd2_S. long:
runs/dmd4_S_model has the first of them merged, and runs/long_S and runs/long_switch_S are those
that long_tuning.py made for it. ranks: LoRAs of runs/rank_R.
"""

import ml_collections


def get_config(which: str) -> ml_collections.ConfigDict:
    rows, sizes = CONFIGS[which]
    config = ml_collections.ConfigDict({"sizes": sizes})
    config.rows = tuple(rows.items())
    return config


def _low_bits() -> dict:
    """Every way of products with every way of memory; each is compared with the same weights as
    they are.
    """
    memory = {"": "", ", KV nvfp4": "nvfp4", ", KV int8": "int8"}
    rows = {"as it is": {}}
    for name, how in {"nvfp4": "nvfp4", "int8": "int8", "fp8": "fp8", "as it is": ""}.items():
        for suffix, kv in memory.items():
            if how or kv:
                rows[name + suffix] = dict(precision=how, kv=kv, like="as it is")
    rows["tuned as it is"], rows["trained, as it is"] = dict(model=TUNED), dict(model=LEARNT)
    rows["tuned as it is, nvfp4"] = dict(model=TUNED, precision="nvfp4", like="tuned as it is")
    for suffix, kv in memory.items():
        trained = dict(model=LEARNT, precision="nvfp4", kv=kv, like="trained, as it is")
        rows["trained, nvfp4" + suffix] = trained
    return rows


TUNED, LEARNT = "runs/bf_{}_model", "runs/nv_{}_model"
LORA = "runs/{}/lora.safetensors"
FEW = {
    "50 steps": dict(steps=50),
    "4 steps": dict(steps=4),
    "2 steps": dict(steps=2),
    "4 steps, DMD": dict(steps=4, lora=LORA.format("dmd4_{}")),
    "2 steps, DMD": dict(steps=2, lora=LORA.format("dmd2_{}")),
}
RANKS = {f"rank {rank}": dict(steps=4, lora=LORA.format(f"rank_{rank}")) for rank in (4, 8, 16, 64)}
CLEAN = {
    f"{steps} steps{name}": dict(steps=steps) | changes
    for steps in (4, 2)
    for name, changes in {
        "": {},
        ", no clean pass": dict(clean_pass=False, like=f"{steps} steps"),
    }.items()
}
SCORES = {"as it is": {}} | {
    f"KV {kv}{name}": dict(kv=kv, eight_bit_scores=bool(name), like="as it is")
    for kv in ("int8", "fp8")
    for name in ("", ", scores too")
}
DISTILLED = "runs/dmd4_{}_model"
LONG = {
    "distilled": dict(model=DISTILLED),
    "long": dict(model=DISTILLED, lora=LORA.format("long_{}")),
    "long, switches": dict(model=DISTILLED, lora=LORA.format("long_switch_{}")),
}
CONFIGS = {
    "low_bits": (_low_bits(), dict(prompts=32, long=8)),
    "clean_pass": (CLEAN, dict(prompts=32, long=8)),
    "scores": (SCORES, dict(prompts=32, long=8)),
    "few_steps": (FEW, dict(prompts=56, long=8)),
    "ranks": (RANKS, dict(prompts=56, long=8)),
    "long": (LONG, dict(prompts=32, long=8, seconds=120.0, switching=8)),
}
