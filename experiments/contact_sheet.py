"""A picture of what the tiny model makes: a row per video, a frame about every second.

python experiments/contact_sheet.py --output experiments/tiny.png
"""

import av
import numpy as np
from absl import app, flags

import longlive_jax
from longlive_jax import Event, cache_dir

_OUTPUT = flags.DEFINE_string("output", "experiments/tiny.png", "The picture to write.")
_MODEL = flags.DEFINE_string("model", "tiny", "tiny, or a folder.")
_STEPS = flags.DEFINE_integer("steps", None, "Denoising steps.")

SECONDS, EVERY, SCALE = 12, 16, 2
VIDEOS = (
    ("a red circle moves left over a black background", ()),
    ("a blue square bounces over a grey background", ()),
    ("a green triangle moves up over a navy background", ()),
    ("a white circle circles over a striped background", ()),
    ("a magenta square moves right over a checkered background", ()),
    ("a cyan triangle moves down over a black background", ()),  # a pair that training never saw
    (
        "a yellow circle moves right over a black background",
        (Event(6.0, "switch", "a blue circle moves right over a black background"),),
    ),
    (
        "a red square stays still over a grey background",
        (Event(6.0, "cut", "a green circle bounces over a navy background"),),
    ),
)


def main(_):
    cache_dir.enable()
    model = longlive_jax.load(_MODEL.value)
    rows = []
    for prompt, events in VIDEOS:
        session = model.session(prompt, seed=3, steps=_STEPS.value)
        chunks = session.stream(SECONDS, events=events, lookahead=1)
        frames = np.concatenate(list(chunks))[EVERY // 2 :: EVERY]
        rows.append(np.concatenate(list(np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)))), 1))
    sheet = np.concatenate(rows).repeat(SCALE, 0).repeat(SCALE, 1)
    with av.open(_OUTPUT.value, "w") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = *sheet.shape[:2], "rgb24"
        frame = av.VideoFrame.from_ndarray(sheet, format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode(None)])


if __name__ == "__main__":
    app.run(main)
