"""Draws what attention costs by the length of a video (pip install matplotlib).

longlive bench --suite train --cpu_devices 4 --json train.json
python experiments/plot_attention.py --report train.json --output experiments/attention.png
"""

import json
import pathlib

import matplotlib
from absl import app, flags

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402

_REPORT = flags.DEFINE_string("report", None, "What the bench has written.", required=True)
_OUTPUT = flags.DEFINE_string("output", "attention.png", "The picture.")

PANELS = {
    "forward": ("forward_s", "forward_bytes"),
    "forward and gradient": ("gradient_s", "gradient_bytes"),
}
NAMES = {"xla": "the table's tiles (xla)", "reference": "dense mask (reference)"}


def main(_):
    report = json.loads(pathlib.Path(_REPORT.value).read_text("utf-8"))
    lines: dict[str, list[tuple[int, dict]]] = {}
    for name, row in report["attention"].items():
        backend, frames = name.split()
        lines.setdefault(backend, []).append((int(frames), row))
    figure, axes = plt.subplots(2, 2, figsize=(8, 5), sharex=True, layout="constrained")
    for column, (title, fields) in enumerate(PANELS.items()):
        for axis, field, unit in zip(axes[:, column], fields, ("s", "MiB"), strict=True):
            for backend, rows in lines.items():
                scale = 1 if unit == "s" else 2**-20
                points = [(frames, row[field] * scale) for frames, row in rows]
                axis.plot(*zip(*points, strict=True), marker="o", label=NAMES[backend])
            axis.set(xscale="log", yscale="log", ylabel=unit, xticks=[f for f, _ in lines["xla"]])
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.minorticks_off()
        axes[0, column].set_title(title)
        axes[1, column].set_xlabel("latent frames")
    axes[0, 0].legend(frameon=False)
    figure.suptitle(f"one layer, teacher forcing, {report['model']}, {report['device']}")
    figure.savefig(_OUTPUT.value, dpi=110)


if __name__ == "__main__":
    app.run(main)
