"""Commands of the documents, and how tests run them: as written, but for what shortens them."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = ("README.md", "experiments/README.md", "experiments/speed.md", "kernels/README.md")

# A line of a shell block or words in backticks are a command if they begin so.
BEGINS = re.compile(r"(\w+=\S+ )*(time )?((longlive|python3?|pip|\.ci/run)( |$)|\w+\.py \S|… -)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)

# What stands for the reader's own choice. `C` is explained above the table that uses it.
PLACEHOLDERS = (
    (r"^… ", "train_ar.py C:direct "),  # "the same" of the row above
    (r"\bC:", "--config=experiments/configs/ar_toy.py:"),
    (r"(?<=[_=])S(?![a-z])", "0"),  # a seed
    (r"--seconds S\b", "--seconds 16"),
    (r"\b1xB\b", "1x8"),
    (r"\bPATH\b", "plan.json"),
    (r"--steps N\b", "--steps 2"),
    (r"\bP\b", "int8"),
    (r"runs/…_model", "runs/direct1_model"),
    (r"runs/…/", "runs/dmd4_0/"),
)

# Commands that are not run, by what they begin with, and why; what they name must be there.
INSTALLS = re.compile(r"python3? -m venv |\. \.venv/|pip install ")  # CI does so, from nothing
TESTS = re.compile(r"python -m pytest |\.ci/run$")  # CI runs them themselves
NAMES = re.compile(r"longlive (data check|[\w-]+)$")  # of a command, in prose: its help is asked


@dataclasses.dataclass(frozen=True)
class Group:
    """Commands that are run one after the other, in one folder.

    Attributes:
      commands: As documented, with the flags that are added or take the place of others.
      stand_ins: Names of files that cannot be had here, which the test makes beforehand.
      needs: Packages without which the group is skipped.
      marks: `long` for what takes a minute or more, `named` for several minutes, `aot` for what
        needs that extra.
    """

    commands: dict[str, str]
    stand_ins: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()


SECOND = "--seconds 1"
SHORT = f"{SECOND} --repeat 1"
TRAINED = "--config.optimizer.steps=1"
DISTILLED = (
    "--config.student.steps=1 --config.fake.steps=1 --config.every=1 --config.prompts.batch=2"
)
COMPARED = "--seeds 0 --config.sizes.prompts=2 --config.sizes.long=1"
LARGE = "longlive bench --preset {} --random_weights --seconds 30"
CIRCLE = '--prompt "a red circle moves left over a black background"'
CAT = '--prompt "a cat walks through tall grass"'
AR = "python experiments/train_ar.py --config=experiments/configs/ar_toy.py --workdir=runs/ar"
LONG_TOY = "python experiments/long_tuning.py --config=experiments/configs/long_toy.py"
DMD_TOY = "python experiments/distill_dmd.py --config=experiments/configs/dmd_toy.py"
COMPARE = "python experiments/compare.py --config=experiments/configs/compare.py"

GROUPS = {
    "a first video": Group(
        {
            f"longlive generate {CIRCLE}"
            ' --at "5: a blue circle moves left over a black background"'
            ' --cut "8: a green square bounces over a grey background"'
            " --seconds 10 --output out.mp4": "",
            f"longlive generate --seconds 10 {CIRCLE}": SECOND,
        }
    ),
    "official weights": Group(
        {
            "longlive convert --from Wan2.1-T2V-1.3B --from longlive_base.pt --from lora.pt"
            " --to longlive-1.3b": "",
            f"longlive generate --model longlive-1.3b {CAT} --seconds 30": SECOND,
            "longlive convert --from longlive-1.3b --to back --to-format pytorch": "",
            "longlive convert --steps 2": "--from Wan2.1-T2V-1.3B --from longlive_base.pt --to two",
        },
        stand_ins=("Wan2.1-T2V-1.3B", "longlive_base.pt", "lora.pt"),
        needs=("torch",),
    ),
    "packed weights": Group(
        {
            "longlive convert --from Wan2.2-TI2V-5B --from model_4o6.pt --to longlive2-fp4": "",
            f"longlive generate --model longlive2-fp4 --weights_only {CAT}": SECOND,
            "longlive convert --dequantize": "--from longlive2-fp4 --to unpacked",
        },
        stand_ins=("Wan2.2-TI2V-5B", "model_4o6.pt"),
        needs=("torch",),
    ),
    "fewer bits": Group(
        {
            f"longlive generate --precision nvfp4 --kv nvfp4 {CIRCLE}": SECOND,
            "longlive quantize --model tiny --precision nvfp4"
            ' --layers "blocks.ffn_*=int8" --output models/tiny_fp4': "",
            "longlive quantize --tile 16": "--precision nvfp4 --output models/tiny_tile",
        }
    ),
    "training": Group(
        {
            "python experiments/make_toy_folder.py --output runs/toy --samples 64 --chunks 16": (
                "--samples 2"
            ),
            "longlive data check runs/toy --preset tiny": "",
            f"{AR} --config.seq=4 --cpu_devices=4": f"{TRAINED} --config.source.batch=1",
        }
    ),
    "few steps": Group(
        {
            "python experiments/make_toy_prompts.py --output runs/prompts.jsonl": "--count 8",
            f"{DMD_TOY}:steps2 --workdir=runs/dmd2": DISTILLED,
            f"longlive generate --lora runs/dmd2/lora.safetensors --steps 2 {CIRCLE}": SECOND,
            f"{LONG_TOY} --workdir=runs/long": DISTILLED,
        }
    ),
    "attacks": Group(
        {
            "python experiments/attack_files.py --count 1000": "--count 3 --kinds config,lora",
            "python experiments/attack_interrupts.py --count 300": "--count 1 --kinds next_chunk",
            "python experiments/mutations.py --count=100": "--show",
        },
        marks=("long",),
    ),
    "plans": Group(
        {
            "longlive plan --seconds 240": "--preset wan21_1_3b --gpu h100 --source formula",
            "longlive plan --preset wan22_5b --gpu h100 --precision P --kv P": "--source formula",
        }
    ),
    "plans of training": Group(
        {
            "longlive plan --preset wan22_5b --train --seconds S --mesh 1xB"
            " --gpu h100 --json PATH": "--preset tiny",
        },
        marks=("aot",),
    ),
    "speed": Group(
        {
            "python experiments/gpu_check.py": "--only memory --json gpu.json",
            "longlive bench --seconds 5": SHORT,
            "longlive bench --steps N --repeat 2": SHORT,
            "longlive bench --preset tiny --random_weights --seconds 5": SHORT,
            "longlive bench --suite vae --preset tiny --random_weights --repeat 9": "--repeat 1",
        }
    ),
    "long videos": Group(
        {
            "longlive bench --seconds 240 --repeat 1": "--seconds 20",
            "longlive bench --suite session --repeat 3": "--seconds 8 --repeat 1",
        },
        stand_ins=("little effort",),
        marks=("long",),
    ),
    "cost of spreading": Group(
        {
            "longlive bench --suite train --cpu_devices 4 --json train.json": (
                "--seconds 3 --repeat 1"
            )
        },
        marks=("named",),
    ),
    "speed of large models": Group(
        {
            LARGE.format("wan21_1_3b") + " --json h100_13b.json": SHORT,
            LARGE.format("wan21_1_3b") + " --change none --json h100_13b_steady.json": SHORT,
            LARGE.format("wan22_5b") + " --json h100_5b.json": SHORT,
            LARGE.format("wan22_5b") + " --change none --json h100_5b_steady.json": SHORT,
            LARGE.format("wan22_5b") + " --vae tae --json h100_5b_tae.json": SHORT,
            LARGE.format("wan22_5b") + " --vae light --json h100_5b_light.json": SHORT,
            LARGE.format("wan22_5b") + " --kv nvfp4 --json h100_5b_kv4.json": SHORT,
            "longlive bench --suite session --preset wan21_1_3b --random_weights --seconds 60"
            " --json h100_session.json": "--seconds 8 --repeat 1",
            "longlive bench --suite vae --preset wan21_1_3b --random_weights"
            " --json h100_vae_13b.json": "--repeat 1",
            "longlive bench --suite vae --preset wan22_5b --random_weights"
            " --json h100_vae_5b.json": "--repeat 1",
            "longlive bench --suite train --preset wan21_1_3b --random_weights --seconds 12"
            " --repeat 3 --json h100_train.json": SHORT,
        },
        stand_ins=("wan21_1_3b", "wan22_5b", "little effort"),
        marks=("named",),
    ),
    "speed of kernels": Group(
        {
            "longlive bench --suite kernels --repeat 10 --json h100_kernels.json": (
                "--repeat 1 --shapes small"
            ),
            "longlive bench --suite kernels --op attention/sink_window --repeat 10": "--repeat 1",
            "longlive bench --suite kernels --op attention/sink_window --shapes all --repeat 3": (
                "--shapes small --repeat 1"
            ),
            "longlive bench --suite kernels": "--repeat 1 --op nvfp4/quantize",
            "longlive bench --suite kernels --repeat 31": "--repeat 1 --op nvfp4/quantize",
        },
        marks=("named",),
    ),
    "scores": Group(
        {
            "longlive eval --suite toy --json eval.json": "",
            "longlive eval --suite switch --json switch.json": "",
            "longlive eval --suite drift": "--seconds 10",
        },
        stand_ins=("few videos",),
        marks=("named",),
    ),
    "pictures and tables": Group(
        {
            "python experiments/contact_sheet.py": "--steps 1",
            "python experiments/storage_costs.py --chunks 40": "--chunks 1",
            "python experiments/weight_tiles.py": "",
        },
        marks=("named",),
    ),
    "the model that ships": Group(
        {
            "python experiments/train_vae.py --workdir runs/vae": TRAINED,
            "python experiments/make_pool.py --vae runs/vae/vae.safetensors --output runs/pool"
            " --shards 12 --videos 150": "--shards 2 --videos 4",
            "python experiments/train_tiny_dit.py --pool runs/pool --workdir runs/dit": TRAINED,
            "python experiments/train_tiny_dit.py --pool runs/pool --workdir runs/dit2"
            " --init longlive_jax/models/tiny": TRAINED,
            "python experiments/export_tiny.py --vae runs/vae/vae.safetensors"
            " --dit runs/dit/ema.safetensors": "--output models/tiny",
        },
        marks=("long",),
    ),
    "the trainer of the large ones": Group(
        {
            "make_toy_folder.py --output runs/toy --samples 400 --chunks 16": "--samples 4",
            "make_toy_folder.py --output runs/clips --samples 3000 --chunks 4 --cuts 0": (
                "--samples 16 --output runs/clips"
            ),
            "train_ar.py C:clip --workdir=runs/clip": TRAINED,
            "export_run.py --workdir runs/clip --output runs/clip_model": "",
            "train_ar.py C:direct --workdir=runs/direct1": TRAINED,
            "… --workdir=runs/direct4 --config.seq=4 --cpu_devices=4": TRAINED,
            "… --workdir=runs/scratch --config.fresh=True": TRAINED,
            "train_ar.py C:recycled --workdir=runs/recycled_S": TRAINED,
            "train_ar.py C:tune --workdir=runs/clean_S": TRAINED,
            "train_ar.py C:tune --workdir=runs/bf_S": TRAINED,
            "train_ar.py C:nvfp4 --workdir=runs/nv_S": f"{TRAINED} --config.source.chunks=4",
            "longlive eval --suite toy --model runs/…_model": "",
        },
        stand_ins=("runs/direct1_model", "few videos"),
        marks=("named",),
    ),
    "distillation": Group(
        {
            "python experiments/make_toy_prompts.py --output runs/prompts.jsonl": "--count 8",
            f"{DMD_TOY}:steps4 --workdir=runs/dmd4_S": DISTILLED,
            "longlive merge-lora --model tiny --lora runs/dmd4_S/lora.safetensors"
            " --output runs/dmd4_S_model": "",
            f"{LONG_TOY}:plain --config.model=runs/dmd4_S_model --config.teacher=tiny"
            " --config.critic=tiny --config.student.steps=150 --config.fake.steps=150"
            " --config.seed=S --config.prompts.seed=S --workdir=runs/long_S": DISTILLED,
            f"{LONG_TOY}:plain --workdir=runs/direct_4_0": DISTILLED,
            "longlive eval --suite drift --lora runs/…/lora.safetensors": "--seconds 10",
        },
        stand_ins=("few videos",),
        marks=("long",),
    ),
    "comparisons": Group(
        {
            f"{COMPARE}:clean_pass --output=runs/clean_pass": (
                f"{COMPARED} --rows '2 steps, no clean pass'"
            ),
            f"{COMPARE}:scores --output=runs/scores": f"{COMPARED} --rows 'KV int8, scores too'",
            f"{COMPARE}:low_bits --output=runs/low_bits": (
                f"{COMPARED} --rows 'nvfp4, KV nvfp4' --rows 'trained, as it is'"
            ),
            f"{COMPARE}:few_steps --output=runs/few_steps": f"{COMPARED} --rows '2 steps, DMD'",
            f"{COMPARE}:ranks --output=runs/ranks --seeds=0": f"{COMPARED} --rows 'rank 4'",
            f"{COMPARE}:long --output=runs/long": (
                f"{COMPARED} --rows 'long, switches' --config.sizes.seconds=20"
                " --config.sizes.switching=1"
            ),
        },
        stand_ins=(
            *("runs/nv_0_model", "runs/dmd4_0_model", "runs/rank_4/lora.safetensors"),
            *("runs/dmd2_0/lora.safetensors", "runs/long_switch_0/lora.safetensors"),
        ),
        marks=("named",),
    ),
    "a full size": Group(
        {"python experiments/full_size.py --workdir runs/full": "--stage write"},
        marks=("long",),
    ),
    "programs for a GPU": Group(
        {
            "python experiments/pointwise.py --preset wan21_1_3b": "",
            "python experiments/dmd_memory.py": "--rows 1 --layers 1",
            "JAX_PLATFORMS=cpu MOSAIC_GPU_DUMP_PTXAS=1 MOSAIC_GPU_DUMP_HOST_LLVM=1"
            " python tests/aot/chunk_table_program.py h100 5b_96_frames_4_ranks": "",
        },
        marks=("aot",),
    ),
}


def commands(document: str) -> list[str]:
    """The commands of a document, with single spaces, without comments and `time`."""
    text = (ROOT / document).read_text("utf-8")
    found = []
    for language, block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines() if language in ("", "bash") else ():
            line = re.sub(r"\s# .*", "", line)
            found += line.split("&&") if language == "bash" or BEGINS.match(line) else []
    for words in re.findall(r"`([^`]+)`", BLOCK.sub("", text)):
        if BEGINS.match(" ".join(words.split())):
            found += words.split("&&")
    return [" ".join(x.split()).removeprefix("time ") for x in found if x.strip()]


def filled(command: str, more: str = "") -> list[str]:
    """Return the words of a command with values in place of the reader's own choices.

    Args:
      command: As documented.
      more: Flags that are added; those of the same names are left out of the command.
    """
    for pattern, value in PLACEHOLDERS:
        command = re.sub(pattern, value, command)
    added = shlex.split(more)
    replaced = {word.partition("=")[0] for word in added if word.startswith("--")}
    words, kept = shlex.split(command), []
    while words:
        word = words.pop(0)
        name, _, value = word.partition("=")
        if name not in replaced:
            kept.append(word)
        elif not value and words and not words[0].startswith("--"):
            words.pop(0)
    return [*kept, *added]
