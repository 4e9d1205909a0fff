"""What is said of a data set: every fault by itself, where it is, and what is done about it."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from test_media import film

from longlive_jax import config as configs
from longlive_jax import output
from longlive_jax.data import check, toy_folder
from longlive_jax.data.check import FAULT, WARNING
from longlive_jax.errors import InputError

TINY = configs.TINY


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "toy"
    toy_folder.write(root, seed=3, samples=3, chunks=4)
    return root


@pytest.fixture
def own(world, tmp_path, monkeypatch):
    """A copy, as toy/ in the current folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(world, tmp_path / "toy").relative_to(tmp_path)


def noise(path, *, count=40, size=(64, 64), fps=16, **choices):
    frames = np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)
    film(path, list(frames), fps, **choices)


def test_a_sound_data_set(own):
    before = sorted((path, path.stat().st_mtime_ns) for path in own.rglob("*"))
    report = check.check(own, TINY)
    assert report.problems == ()
    assert (report.samples, report.usable, report.model) == (3, 3, "tiny")
    assert report.clips == len(list(own.rglob("*.mp4"))) > 3
    assert report.seconds == pytest.approx(3 * 45 / 16)
    assert report.hours == pytest.approx(report.seconds / 3600)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in own.rglob("*"))


def remove_caption(root):
    (root / "caption/00001/0.json").unlink()


def blank_caption(root):
    (root / "caption/00001/0.json").write_text('{"caption": ""}')


def latin(root):
    (root / "caption/00001/0.json").write_bytes(b'{"caption": "caf\xe9"}')


def no_json(root):
    (root / "caption/00001/0.json").write_text("a red circle")


def no_captions(root):
    shutil.rmtree(root / "caption/00001")


def no_videos(root):
    for file in (root / "video/00001").iterdir():
        file.unlink()
    shutil.rmtree(root / "caption/00001")


def half(root):
    path = root / "video/00001/0.mp4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def short(root):
    noise(root / "video/00001/0.mp4", count=5)


def twice(root):
    shutil.copy(root / "video/00001/0.mp4", root / "video/00001/0.mov")


def named(root):
    shutil.copy(root / "video/00001/0.mp4", root / "video/00001/intro.mp4")
    shutil.copy(root / "caption/00001/0.json", root / "caption/00001/intro.json")


def more_captions(root):
    (root / "caption/00001/9.json").write_text('{"caption": "x"}')
    (root / "caption/00001/global.json").write_text("anything")


def durations(root):
    (root / "caption/00001/shot_durations.txt").write_text("2, 3, 4, 5, 6")


def no_numbers(root):
    (root / "caption/00001/shot_durations.txt").write_text("two, 3")


def no_folder(root):
    shutil.copytree(root / "caption/00001", root / "caption/00007")


def slow(root):
    noise(root / "video/00001/0.mp4", fps=8)


def fast(root):
    noise(root / "video/00001/0.mp4", count=300, fps=240)


def uneven(root):
    times = np.cumsum([0, *[60] * 20, 400, *[60] * 20]).tolist()
    noise(root / "video/00001/0.mp4", count=42, times=times)


def small(root):
    noise(root / "video/00001/0.mp4", size=(32, 32))


def wide(root):
    noise(root / "video/00001/0.mp4", size=(64, 192))


V, C = "video/00001/0.mp4", "caption/00001/0.json"
FAULTS = [
    (remove_caption, WARNING, C, "is missing: 0.mp4 is left out"),
    (blank_caption, WARNING, C, "is empty: 0.mp4 is left out"),
    (latin, FAULT, C, "is not in UTF-8: save it as UTF-8 text"),
    (no_json, FAULT, C, "line 1 is not JSON"),
    (no_captions, FAULT, "video/00001", "has no clip with a caption that is as long as a chunk"),
    (no_videos, FAULT, "video/00001", "has no clip with a caption"),
    (half, FAULT, V, "is damaged, or no video that can be read"),
    (short, WARNING, V, "lasts 0.31 s, less than a chunk of 0.56 s: it is passed over"),
    (twice, WARNING, C, "is that of 2 videos"),
    (named, WARNING, "video/00001/intro.mp4", "has no number"),
    (more_captions, WARNING, "caption/00001/9.json", "belongs to no video"),
    (durations, WARNING, "caption/00001/shot_durations.txt", "has 5 numbers for "),
    (no_numbers, WARNING, "caption/00001/shot_durations.txt", "is no list of whole numbers: two"),
    (no_folder, WARNING, "caption/00007", "has no folder video/00007"),
    (slow, WARNING, V, "has 8 FPS: frames repeat at 16 FPS"),
    (fast, WARNING, V, "has 240 FPS"),
    (uneven, WARNING, V, "has frames of unequal length"),
    (small, WARNING, V, "is 32x32, and is enlarged to 64x64"),
    (wide, WARNING, V, "is 192x64: 67% of the picture is cropped for 64x64"),
]


@pytest.mark.parametrize(
    ("spoil", "state", "file", "said"), FAULTS, ids=lambda x: getattr(x, "__name__", str(x)[:24])
)
def test_what_is_wrong_is_said_where_it_is(own, spoil, state, file, said):
    spoil(own)
    report = check.check(own, TINY)
    found = [problem for problem in report.problems if problem.found.startswith(said)]
    (problem,) = found
    assert (problem.state, problem.file) == (state, file)
    assert problem.sample == ("00007" if spoil is no_folder else "00001")
    assert problem.mend and "toy" not in problem.found
    faults = any(problem.state == FAULT for problem in report.problems)
    assert report.usable == 3 - faults
    assert state == WARNING or faults


def test_what_other_systems_leave_in_folders_is_passed_over(own):
    before = check.check(own, TINY)
    for name in ("video/@eaDir", "caption/00001/__MACOSX", "video/00001/.AppleDouble"):
        (own / name).mkdir()
    for name in ("video/00001/._0.mp4", "caption/00001/._0.json", "video/Thumbs.db"):
        (own / name).write_bytes(b"\0\5\x16\7")
    assert check.check(own, TINY) == before


def test_the_report_is_printed_and_written(own, capsys):
    half(own)
    latin(own)
    with pytest.raises(InputError) as caught:
        check.run(own, None, "tiny")
    message = str(caught.value)
    assert message.startswith("1 of 3 samples in toy cannot be used, the first because caption/")
    shown = capsys.readouterr().out
    assert "toy, for tiny" in shown
    assert f"fault: {C} is not in UTF-8" in shown
    with pytest.raises(InputError, match="1 of 3"):
        check.run(own, own.parent / "report.json", "tiny")
    data = json.loads((own.parent / "report.json").read_text())
    assert (data["samples"], data["usable"]) == (3, 2)
    assert list(data["problems"][0]) == ["state", "sample", "file", "found", "mend"]
    capsys.readouterr()


def test_a_sound_report_is_no_error_and_leaves_stdout_to_json(own, capsys):
    check.run(own, output.STDOUT, "tiny")
    captured = capsys.readouterr()
    assert json.loads(captured.out)["problems"] == []
    assert "samples" in captured.err
    assert sorted(os.listdir(".")) == ["toy"]


def test_the_same_problem_of_many_files_is_shown_once(own, capsys):
    check.run(own, None)  # the toy world is small and slow for the 5B
    shown = capsys.readouterr().out
    assert shown.count("has 16 FPS: frames repeat at 24 FPS") == 1
    assert "more)" in shown


def test_bad_questions_are_refused(own):
    with pytest.raises(InputError, match='--preset "huge" is not known: say tiny, '):
        check.run(own, None, "huge")
    with pytest.raises(InputError, match="there is no folder toy/no"):
        check.run(own, own / "no" / "report.json", "tiny")
    with pytest.raises(InputError, match="is no data set"):
        check.run(own / "video", None)


def test_checking_needs_no_jax():
    script = "import sys; from longlive_jax.data import check; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
