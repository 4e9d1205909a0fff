"""Tunes a model to long videos of its own, clip by clip, with switches of prompts on the way
(LongLive 1.0 section 3.2).

python experiments/long_tuning.py --config=experiments/configs/long_toy.py --workdir=runs/long

Stop it at any time, also in the middle of a long video; the same command goes on from there.
"""

import distillation
from absl import app

_CONFIG = distillation.define("experiments/configs/long_toy.py")


def main(_):
    distillation.launch(_CONFIG.value)


if __name__ == "__main__":
    app.run(main)
