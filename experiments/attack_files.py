"""Damages files of every kind that is read, and counts what comes of it.

python experiments/attack_files.py --count 1000 --kinds config,session,safetensors,lora,pt,media

A file is loaded, or refused with one sentence (`InputError`). Any other exception, a crash, a hang
and too much memory are faults: each is logged with the number that makes it again, and the exit
code is 1. Files are read in child processes, many in each.
"""

import collections
import copy
import json
import pathlib
import random
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile

import numpy as np
from absl import app, flags, logging

from longlive_jax import lora as loras
from longlive_jax import media, model, saved, saved_check, video, weights
from longlive_jax.config import folder_of
from longlive_jax.convert.source import open_checkpoint
from longlive_jax.data import folder as footage
from longlive_jax.errors import InputError
from longlive_jax.train.checkpoint import told_by_us

KINDS = ("config", "session", "safetensors", "lora", "pt", "media")
FINE = ("loaded", "refused")

_COUNT = flags.DEFINE_integer("count", 1000, "Files of each kind.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the damage.")
_KINDS = flags.DEFINE_list("kinds", list(KINDS), "Kinds of files.")
_MEMORY = flags.DEFINE_float("memory", 1.0, "GB that reading one file may take.")
_SECONDS = flags.DEFINE_float("seconds", 60.0, "That reading one file may take.")
_CHILD = flags.DEFINE_string("child", None, "A kind: reads files of it, from --start on.")
_START = flags.DEFINE_integer("start", 0, "The first file of a child.")
_BASE = flags.DEFINE_string("base", None, "The folder of whole files of a child.")

VALUES = (
    *(None, True, -1, 0, 1, 3, 2**31, 2**63, 2**70, -(2**63), 10**400, 1e308, -0.5, 1e-300),
    *("abc", "", "\ud800x", "x" * 5000, [], {}, [[]], [1, 2], {"a": 1}, [2**40] * 3),
)
ODD_TEXTS = ("NaN", "Infinity", "-Infinity", "1e999", "[" * 5000, '{"a":' * 5000, "9" * 5000)
REFERRING = (
    "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{0}\n#EXT-X-ENDLIST\n",
    "ffconcat version 1.0\nfile '{0}'\n",
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
)


# Whole files.


def make_base(base: pathlib.Path) -> None:
    """Writes a whole file of each kind, made from the tiny model."""
    tiny = model.load("tiny")
    session = tiny.session("a red circle", steps=2)
    session.begin_chunk()
    session.save(base / "session")
    some = dict(list(weights.flatten(tiny.vae).items())[:6])
    weights.save(base / "a.safetensors", some)
    import jax

    adapter = loras.init(tiny.dit, 2, jax.random.key(0), alpha=4)
    loras.save(base / "lora.safetensors", adapter)
    try:
        import torch
    except ImportError:
        logging.warning("without PyTorch no .pt files are read")
    else:
        tensors = {name: torch.from_numpy(np.array(x)) for name, x in some.items()}
        content = {"generator": tensors, "step": 3, "lr": [0.5, {"a": None}]}
        torch.save(content, base / "new.pt")
        torch.save(content, base / "old.pt", _use_new_zipfile_serialization=False)
    frames = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), np.uint8)
    for suffix in (".mp4", ".mkv", ".mov"):
        with video.VideoWriter(base / f"a{suffix}", 16) as writer:
            writer.write(frames)
    picture(base / "a.png", frames[0])


def picture(path: pathlib.Path, pixels: np.ndarray) -> None:
    """Writes a PNG."""
    import av

    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    coder = av.CodecContext.create("png", "w")
    coder.width, coder.height, coder.pix_fmt, coder.framerate = 64, 64, "rgb24", 1
    frame.pts = 0
    path.write_bytes(b"".join(bytes(p) for p in coder.encode(frame) + coder.encode(None)))


# Damage.


def damaged(draw: random.Random, data: bytes) -> bytes:
    """Flipped bits, other numbers, pieces cut out, repeated or put in; most near the start."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        size = draw.choice((256, 2048, len(data)))
        at = draw.randrange(max(1, min(size, len(data))))
        how = draw.randrange(7)
        if how == 0 and data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        elif how == 1:
            width = draw.choice((1, 2, 4, 8))
            number = draw.choice((0, 1, 0xFF, 0x7FFFFFFF, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
            order = draw.choice(("little", "big"))
            data[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, order)
        elif how == 2:
            del data[at:]
        elif how == 3:
            del data[at : at + draw.choice((1, 4, 100))]
        elif how == 4:
            data[at:at] = data[at : at + draw.choice((1, 16, 1000))]
        elif how == 5:
            data[at:at] = draw.randbytes(draw.choice((1, 4, 64)))
        else:
            data[at : at + 8] = draw.randbytes(8)
    return bytes(data)


def places(value, path=()):
    """The paths of all values in a document."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else items:
        yield from places(inner, (*path, key))


def edited(draw: random.Random, data: bytes) -> bytes:
    """A JSON document with other values, without some, or with text that is none."""
    if draw.random() < 0.1:
        return damaged(draw, data)
    document = json.loads(data)
    odd = {}
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        *path, last = draw.choice([path for path in places(document) if path])
        inner = document
        for key in path:
            inner = inner[key]
        how = draw.random()
        if how < 0.1:
            del inner[last]
        elif how < 0.15 and isinstance(inner, dict):
            name = draw.choice(("x", "", "kind", "decoders", "precision"))
            inner[name] = copy.deepcopy(draw.choice(VALUES))
        elif how < 0.25:
            odd[mark := f"odd text {len(odd)}"] = draw.choice(ODD_TEXTS)
            inner[last] = mark
        elif how < 0.5 and isinstance(inner[last], int | float):
            inner[last] = inner[last] * draw.choice((-1, 2, 3, 1000, 0.5, 2**40))
        else:
            inner[last] = copy.deepcopy(draw.choice(VALUES))
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    text = json.dumps(document)
    sys.set_int_max_str_digits(digits)
    for mark, said in odd.items():
        text = text.replace(f'"{mark}"', said)
    return text.encode("utf-8", "surrogatepass")


def with_header(draw: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header, of its own length or of another."""
    size = int.from_bytes(data[:8], "little")
    header = edited(draw, data[8 : 8 + size])
    said = draw.choice((len(header),) * 5 + (size, 2**40, 2**64 - 1))
    return struct.pack("<Q", said) + header + data[8 + size :]


def repacked(draw: random.Random, data: bytes, folder: pathlib.Path) -> bytes:
    """A zip file with another pickle, or compressed."""
    (folder / "whole.zip").write_bytes(data)
    how = draw.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED,))
    with (
        zipfile.ZipFile(folder / "whole.zip") as whole,
        zipfile.ZipFile(folder / "new.zip", "w", how) as new,
    ):
        for name in whole.namelist():
            part = whole.read(name)
            if name.endswith("data.pkl"):
                part = damaged(draw, part)
            elif draw.random() < 0.1:
                part = part[: draw.randrange(len(part) + 1)]
            new.writestr(name, part)
    return (folder / "new.zip").read_bytes()


def attacked(kind: str, draw: random.Random, base: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    """Writes a damaged file of that kind into an empty folder; returns what is to be read."""
    if kind == "config":
        for file in folder_of("tiny").iterdir():
            (to / file.name).symlink_to(file)
        config = to / "config.json"
        data = config.read_bytes()
        config.unlink()
        config.write_bytes(edited(draw, data))
        return to
    if kind == "session":
        shutil.copytree(base / "session", to / "session")
        files = sorted(path for path in (to / "session").rglob("*") if path.is_file())
        facts = to / "session" / saved.FACTS
        file = facts if draw.random() < 0.6 else draw.choice(files)
        how = edited if file.suffix == ".json" or file.name == "_METADATA" else damaged
        file.write_bytes(how(draw, file.read_bytes()))
        return to / "session"
    if kind in ("safetensors", "lora"):
        file = base / ("a.safetensors" if kind == "safetensors" else "lora.safetensors")
        how = draw.choice((damaged, with_header, with_header))
        (to / file.name).write_bytes(how(draw, file.read_bytes()))
        return to / file.name
    if kind == "pt":
        file = base / draw.choice(("new.pt", "old.pt"))
        data = file.read_bytes()
        new = file.name == "new.pt" and draw.random() < 0.6
        (to / file.name).write_bytes(repacked(draw, data, to) if new else damaged(draw, data))
        return to / file.name
    file = base / draw.choice(("a.mp4", "a.mkv", "a.mov", "a.png"))
    data = damaged(draw, file.read_bytes())
    if draw.random() < 0.1:
        text = draw.choice(REFERRING).format(base / "a.mp4").encode()
        data = draw.choice((text, damaged(draw, text)))
    (to / file.name).write_bytes(data)
    return to / file.name


# Reading.


class Readers:
    """Read each kind of file as users do. The tiny model is loaded once."""

    def __init__(self):
        self.tiny = model.load("tiny")
        self.shapes = {path: x.shape for path, x in weights.flatten(self.tiny.dit).items()}

    def config(self, path: pathlib.Path) -> None:
        """Load a model, up to the shapes of a video that begins."""
        loaded = model.load(path)
        loaded.solver()
        saved_check.most_bytes(loaded, 0)

    def session(self, path: pathlib.Path) -> None:
        saved.origin(path)
        saved.restore(path, model=self.tiny)

    def safetensors(self, path: pathlib.Path) -> None:
        weights.load(path)

    def lora(self, path: pathlib.Path) -> None:
        loras.check(loras.read(path), self.shapes)

    def pt(self, path: pathlib.Path) -> None:
        for tensors in open_checkpoint(path).groups.values():
            for name in tensors:
                np.array(tensors[name])

    def media(self, path: pathlib.Path) -> None:
        readers = (
            lambda: media.read_image(path, 64, 64),
            lambda: media.read_clip(path, 64, 64, 16, frames=64),
            lambda: footage.footage(path),
        )
        refused = []
        for read in readers:
            try:
                read()
            except InputError as error:
                refused.append(error)
        if len(refused) == len(readers):
            raise refused[0]


def outcome(readers: Readers, kind: str, seed: int, number: int, base: pathlib.Path) -> str:
    """Read one damaged file; return "loaded", "refused", or what was raised."""
    draw = random.Random(f"{kind} {seed} {number}")
    with tempfile.TemporaryDirectory(dir=base) as folder:
        path = attacked(kind, draw, base, pathlib.Path(folder))
        try:
            getattr(readers, kind)(path)
        except InputError as error:
            return "refused" if "\n" not in str(error) else "a sentence of several lines"
        except Exception as error:  # noqa: BLE001 what is looked for
            return f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "loaded"


def peak(reset: bool = False) -> float:
    """GB that this process took at most since the last reset. 0 where the system does not say."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return 0.0
    if reset:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1e6


def child(kind: str, base: pathlib.Path) -> None:
    """Reads files in this process; tells the parent of each, before and after."""
    readers = Readers()
    for number in range(_START.value, _COUNT.value):
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()
        before = peak(reset=True)
        found = outcome(readers, kind, _SEED.value, number, base)
        grown = peak() - before
        if grown > _MEMORY.value:
            found = f"took {grown:.1f} GB"
        sys.stdout.write(f"{json.dumps([found, round(grown, 3)])}\n")
        sys.stdout.flush()


def attack(kind: str, base: pathlib.Path) -> collections.Counter:
    """Has a child read files, another where that one crashes or hangs; counts what comes of it."""
    counts, number = collections.Counter(), 0
    while number < _COUNT.value:
        settings = {
            "child": kind,
            "start": number,
            "base": base,
            "count": _COUNT.value,
            "seed": _SEED.value,
            "memory": _MEMORY.value,
        }
        command = [sys.executable, __file__, *(f"--{k}={v}" for k, v in settings.items())]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as reading:
            number = follow(kind, reading, number, counts)
    return counts


def follow(kind: str, reading: subprocess.Popen, number: int, counts: collections.Counter) -> int:
    """Reads what a child tells until it ends; returns the number of the next file."""
    begun, patience = False, 10 * _SECONDS.value
    while True:
        ready, _, _ = select.select([reading.stdout], [], [], patience)
        line = reading.stdout.readline() if ready else b""
        if not line:
            break
        patience = _SECONDS.value
        if line.startswith(b"["):
            found = json.loads(line)[0]
            number, begun = number + 1, False
            counts[found.split(":")[0]] += 1
            if found not in FINE:
                logging.error("%s %d: %s", kind, number - 1, found)
        else:
            begun = True
    reading.kill()
    if number >= _COUNT.value:
        return number
    found = "hang" if not ready else f"crash ({reading.wait()})"
    if not begun:
        raise RuntimeError(f"the child that reads {kind} does not begin: {found}")
    logging.error("%s %d: %s", kind, number, found)
    counts[found] += 1
    return number + 1


def main(_):
    if _CHILD.value:
        child(_CHILD.value, pathlib.Path(_BASE.value))
        return
    faults = 0
    logging.get_absl_handler().addFilter(told_by_us)
    with tempfile.TemporaryDirectory() as folder:
        base = pathlib.Path(folder)
        make_base(base)
        for kind in _KINDS.value:
            start = time.perf_counter()
            counts = attack(kind, base)
            seconds = time.perf_counter() - start
            logging.info("%s: %s in %.0f s", kind, dict(counts), seconds)
            faults += sum(count for found, count in counts.items() if found not in FINE)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    app.run(main)
