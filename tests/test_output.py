"""Nothing is overwritten that is read, nothing half-written stays, and every place is looked at
before work begins.
"""

import json
import os
import pathlib
import subprocess
import sys
import warnings

import fake
import pytest
import scripts

from longlive_jax import cache_dir, cli, output, weights
from longlive_jax.errors import InputError
from longlive_jax.request import Request
from longlive_jax.video import VideoWriter

PROMPT = ("generate", "--prompt", "x", "--seconds", "1")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files that commands read, some under two names, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("clip.mp4", "cat.mov", "prompts.txt", "lora.json", "caption.mp4"):
        pathlib.Path(name).write_bytes(b"mine")
    pathlib.Path("model").mkdir()
    pathlib.Path("model/config.json").write_bytes(b"mine")
    story = {"prompt": "x", "seconds": 1, "video": "clip.mp4"}
    pathlib.Path("story.json").write_text(json.dumps(story))
    os.symlink("clip.mp4", "link.mp4")
    os.link("clip.mp4", "twin.mp4")
    os.mkdir("captions")
    pathlib.Path("captions/0.json").write_text('{"caption": "x"}')
    os.mkdir("session")
    pathlib.Path("session/session.json").write_text("{}")
    os.mkdir("empty")
    return tmp_path


def run(*arguments):
    return cli.run(arguments, load=lambda name, **_: fake.Model())


CLASHES = {
    "video": ((*PROMPT, "--video=clip.mp4", "--output=clip.mp4"), "--video"),
    "video through a link": ((*PROMPT, "--video=link.mp4", "--output=clip.mp4"), "--video"),
    "a link to the video": ((*PROMPT, "--video=clip.mp4", "--output=link.mp4"), "--video"),
    "another name of the video": ((*PROMPT, "--video=clip.mp4", "--output=twin.mp4"), "--video"),
    "another spelling": ((*PROMPT, "--video=clip.mp4", "--output=empty/../clip.mp4"), "--video"),
    "image": ((*PROMPT, "--image=cat.mov", "--output=cat.mov"), "--image"),
    "lora": ((*PROMPT, "--lora=lora.json", "--json=lora.json"), "--lora"),
    "script": (("generate", "--script=prompts.txt", "--json=prompts.txt"), "--script"),
    "story": (("generate", "--script=story.json", "--json=story.json"), "--script"),
    "clip of a story": (("generate", "--script=story.json", "--output=clip.mp4"), "--script"),
    "caption": (("generate", "--script=captions", "--json=captions/0.json"), "--script"),
    "model": ((*PROMPT, "--model=model", "--json=model/config.json"), "--model"),
    "shipped": ((*PROMPT, f"--json={weights.__file__}/../models/tiny/config.json"), "--model"),
    "session": (
        ("generate", "--resume=session", "--seconds=1", "--json=session/session.json"),
        "--resume",
    ),
    "report and video": ((*PROMPT, "--json=out.mp4"), "--output"),
    "session and video": ((*PROMPT, "--save-session=out.mp4"), "--output"),
    "video in a session": ((*PROMPT, "--save-session=empty", "--output=empty/x.mp4"), "--output"),
    "eval": (("eval", "--model=model", "--json=model/config.json"), "--model"),
    "bench": (("bench", "--lora=lora.json", "--json=lora.json"), "--lora"),
    "data": (("data", "check", "captions", "--json=captions/0.json"), "DIR"),
}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("clash", CLASHES)
def test_what_is_read_is_not_overwritten(folder, capsys, clash):
    (arguments, flag), before = CLASHES[clash], contents(folder)
    arguments = [os.path.normpath(x) if "models/tiny" in x else x for x in arguments]
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "name another" in said and flag in said
    assert contents(folder) == before


def test_what_is_new_may_lie_beside_what_is_read(folder):
    for arguments in (
        ("--model=model", "--output=model/out.mp4", "--json=model/report.json"),
        ("--video=clip.mp4", "--output=clip2.mp4"),
    ):
        assert run(*PROMPT, *arguments) == 0


def test_a_session_may_be_saved_where_it_came_from(folder):
    place = folder / "session"
    for save in (place, pathlib.Path("session"), pathlib.Path("empty/../session")):
        Request(resume=place, save=save).check()
    with pytest.raises(InputError, match="--json .* is a part of what --resume reads"):
        Request(resume=place, save=place, json=place / "session.json").check()


@pytest.mark.parametrize(
    ("flag", "place", "said"),
    [
        ("--save-session", "captions", "captions is there already and holds no session"),
        ("--save-session", "clip.mp4/x", "cannot write"),
        ("--save-session", "x" * 300, "cannot write"),
        ("--output", "missing/out.mp4", "there is no folder missing"),
        ("--json", "missing/out.json", "there is no folder missing"),
        ("--json", "empty", "is not a file"),
    ],
)
def test_every_place_is_looked_at_first(folder, capsys, flag, place, said):
    def load(*_, **__):
        pytest.fail("work was begun")

    before = contents(folder)
    assert cli.run([*PROMPT, f"{flag}={place}"], load=load) == 2
    assert said in capsys.readouterr().err
    assert contents(folder) == before and not list(folder.glob(".*"))


@pytest.mark.parametrize("command", ["quantize", "merge-lora", "convert"])
def test_a_folder_that_cannot_be_made_is_said_first(folder, capsys, monkeypatch, command):
    monkeypatch.setattr(weights, "write", lambda *_, **__: pytest.fail("work was begun"))
    words = {
        "quantize": ["--precision=int8", "--output"],
        "merge-lora": ["--lora=lora.json", "--output"],
        "convert": ["--from=model", "--to"],
    }[command]
    for place, said in (("captions", "is there already"), ("clip.mp4/x", "cannot write clip.mp4")):
        assert run(command, *words, place) == 2
        assert said in capsys.readouterr().err


# Parts.


def test_the_exported_model_does_not_overwrite_what_it_is_made_of(tmp_path):
    for name in ("vae", "dit"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"trained")
    command = [sys.executable, str(scripts.FOLDER / "export_tiny.py"), "--vae=vae.safetensors"]
    command += ["--dit=dit.safetensors", "--output=."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--output dit.safetensors is what --dit reads" in done.stderr
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"trained"}


KILLED = """
import os, pathlib, sys
from longlive_jax import output
for name, folder in (("out.mp4", False), ("made", True)):
    output.Part(pathlib.Path(name), folder=folder)
os._exit(9)
"""


def test_the_next_run_removes_what_a_killed_one_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert subprocess.run([sys.executable, "-c", KILLED], check=False).returncode == 9
    mine = [".out.mp4.part", ".out.mp4.0123456.part", ".other.mp4.01234567.part"]
    for name in mine:
        pathlib.Path(name).touch()
    left = {name for name in os.listdir() if name not in mine}
    assert len(left) == 2
    alive = output.Part(pathlib.Path("out.mp4"))  # as if another process were at it
    output.check_file(pathlib.Path("out.mp4"))
    with weights.new_folder(pathlib.Path("made")) as stage:
        (stage / "file").touch()
    assert sorted(os.listdir()) == sorted([*mine, alive.path.name, "made"])
    alive.discard()
    assert sorted(os.listdir()) == sorted([*mine, "made"])


def test_what_is_said_of_the_unfinished_folder_names_the_one_asked_for(tmp_path):
    with (
        pytest.raises(InputError, match=f"^no space left in {tmp_path / 'made'}$"),
        weights.new_folder(tmp_path / "made") as stage,
    ):
        raise InputError(f"no space left in {stage}")
    assert not os.listdir(tmp_path)


def test_a_video_that_cannot_be_begun_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr("longlive_jax.video.av.open", fail)
    with pytest.raises(InputError, match="no space left"):
        VideoWriter(tmp_path / "out.mp4", 16)
    assert not os.listdir(tmp_path)


# Standard output and error.

TELL = [sys.executable, "-m", "longlive_jax"]


def shell(command):
    line = f"{sys.executable} -m longlive_jax {command}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["--help", "plan --preset=wan21_1_3b --source=formula"])
def test_a_full_or_closed_output_is_a_sentence(command):
    done = shell(f"{command} >/dev/full")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "longlive: cannot write to standard output: no space left on device\n"
    done = shell(f"{command} >&-")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "longlive: cannot write to standard output: it is closed\n"


def test_a_pipe_that_nobody_reads_ends_in_silence():
    done = shell("--help | true; exit ${PIPESTATUS[0]}")
    assert (done.returncode in (0, 141), done.stderr) == (True, "")
    reader = "import sys, time; sys.stdin.close(); time.sleep(3)"
    done = shell(f"--help | {sys.executable} -c '{reader}'; exit ${{PIPESTATUS[0]}}")
    assert done.stderr == ""


def test_closed_errors_change_no_exit_code(tmp_path):
    assert shell("serenade 2>&-").returncode == 2
    assert shell("serenade 2>/dev/full").returncode == 2
    assert shell("--version 2>&- <&-").stdout.startswith("longlive-jax")


def test_a_cache_that_is_full_is_said_once(capsys):
    with cli._sentences():
        warnings.simplefilter("always")
        for name in ("one", "two"):
            warnings.warn(
                f"{cache_dir.FAILED} for '{name}': OSError: [Errno 28] No space left on device",
                UserWarning,
                stacklevel=1,
            )
    assert capsys.readouterr().err == (
        "longlive: compiled programs are not kept for the next start:"
        " [Errno 28] No space left on device\n"
    )
