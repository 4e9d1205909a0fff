"""Distils a model to a few steps.

python experiments/distill_dmd.py --config=experiments/configs/dmd_toy.py:steps2 --workdir=runs/dmd2
longlive generate --lora runs/dmd2/lora.safetensors --steps 2 --prompt "a red circle moves left over
    a black background" --output video.mp4

Stop it at any time; the same command goes on from the last checkpoint. The last step writes the
LoRA beside the checkpoints; where all weights are learned, export_run.py makes a model of them.
"""

import distillation
from absl import app

_CONFIG = distillation.define("experiments/configs/dmd_toy.py")


def main(_):
    distillation.launch(_CONFIG.value)


if __name__ == "__main__":
    app.run(main)
