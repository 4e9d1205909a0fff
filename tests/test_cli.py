"""The command, from its arguments to files, sentences and exit codes."""

import dataclasses
import json
import os
import subprocess
import sys

import fake
import numpy as np
import pytest
from absl import flags
from test_report import check_schema
from test_video import read

from longlive_jax import cache_dir, cli, output, timeline
from longlive_jax.config import Recache
from longlive_jax.errors import InputError


@pytest.fixture
def longlive(capsys, tmp_path, monkeypatch):
    """Runs the command in an empty folder on the fake model: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model=None):
        code = cli.run(arguments, load=lambda name: model or fake.Model())
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize("seconds", ["0.3", "2", "3.3", "10"])
def test_exactly_as_many_frames_as_asked_for(longlive, seconds):
    code, _, err = longlive("generate", "--prompt", "a dot", "--seconds", seconds)
    assert code == 0, err
    assert len(read("out.mp4")) == round(float(seconds) * 16)
    assert os.listdir() == ["out.mp4"]


def test_prompts_change_in_the_order_of_their_times(longlive):
    model = fake.Model()
    code, out, err = longlive(
        "generate", "--prompt", "one", "--cut", "8: four", "--at=1.5:two", "--at", " 3 : three: 3",
        "--seed", "5", "--steps", "2", "--json", "-", model=model,
    )  # fmt: skip
    assert code == 0, err
    ((prompt, seconds, seed, steps, events),) = model.calls
    assert (prompt, seconds, seed, steps) == ("one", 10.0, 5, 2)
    assert [dataclasses.astuple(event) for event in events] == [
        (1.5, "switch", "two", "recache"),
        (3.0, "switch", "three: 3", "recache"),
        (8.0, "cut", "four", "recache"),
    ]
    data = json.loads(out)
    check_schema(data)
    assert data["frames"] == 160
    assert data["warmup_chunks"] == 2
    assert (data["seed"], data["steps"]) == (5, 2)
    # Chunks begin at frames 0, 9, 21, 33, 45, 57, ...: the first at or after each time.
    assert data["switches"] == [
        {"prompt": "two", "requested_s": 1.5, "applied_s": 33 / 16},
        {"prompt": "three: 3", "requested_s": 3.0, "applied_s": 57 / 16},
        {"prompt": "four", "requested_s": 8.0, "applied_s": 129 / 16},
    ]


def test_what_is_not_read_of_prompts_is_told_once_and_reported(longlive):
    """On stderr, one line a prompt, those of later prompts before the video is made."""
    cut = "The scene transitions. three"
    model = fake.Model(unread=("one", "two", cut))
    code, out, err = longlive(
        "generate", "--prompt", "one", "--at", "1:two", "--at", "2:one", "--cut", "3:three",
        "--at", "4:four", "--json", "-", model=model,
    )  # fmt: skip
    assert code == 0
    told = [line for line in err.splitlines() if line.startswith("unread")]
    assert told == ["unread: one", "unread: two", f"unread: {cut}"]
    assert set(json.loads(out)["notes"]) == {"unread: one", "unread: two"}
    code, out, err = longlive("generate", "--prompt", "four", "--json", "-", model=fake.Model())
    assert code == 0 and json.loads(out)["notes"] == []
    assert "unread" not in err


def test_flags_say_what_a_switch_does(longlive):
    model = fake.Model()
    arguments = ["generate", "--prompt", "one", "--at", "2: two", "--cut", "4: three"]
    assert longlive(*arguments, "--recache", "keep", model=model)[0] == 0
    ((*_, events),) = model.calls
    assert [event.mode for event in events] == ["keep", "keep"]
    choices = ["--recache", "bidirectional", "--sinks", "window", "--rope", "relative"]
    assert longlive(*arguments, *choices, model=model)[0] == 0
    assert model.streamed == [
        {},
        {"rope": "relative", "recache": Recache("bidirectional", "window")},
    ]


def test_a_story_and_a_list_of_prompts_are_made(longlive):
    model, events = fake.Model(), [{"at": 1, "switch": "two"}, {"at": 2, "cut": "three"}]
    with open("cat.png", "wb"), open("story.json", "w", encoding="utf-8") as file:
        json.dump(
            {"prompt": "one", "seconds": 3, "seed": 7, "image": "cat.png", "events": events}, file
        )
    code, _, err = longlive("generate", "--script", "story.json", "--output", "s.mp4", model=model)
    assert code == 0, err
    ((prompt, seconds, seed, _, told),) = model.calls
    assert (prompt, seconds, seed) == ("one", 3, 7)
    assert [(e.time_s, e.kind, e.prompt) for e in told] == [
        (1, "switch", "two"),
        (2, "cut", "three"),
    ]
    assert [str(image) for image, _ in model.begun] == ["cat.png"]
    assert len(read("s.mp4")) == 48
    with open("prompts.txt", "w", encoding="utf-8") as file:
        file.write("one\n\ntwo\n")
    code, _, err = longlive(
        "generate", "--script", "prompts.txt", "--seconds", "1", "--json", "r.json"
    )
    assert code == 0, err
    assert {"out-000.mp4", "out-001.mp4", "r-000.json", "r-001.json"} < set(os.listdir())


def test_the_session_is_saved_also_after_ctrl_c(longlive):
    model = fake.Model(interrupt_at=2)
    code, _, _ = longlive("generate", "--prompt", "one", "--save-session", "here", model=model)
    assert (code, [str(folder) for folder in model.saved]) == (130, ["here"])


def test_the_report_can_be_a_file(longlive):
    code, out, err = longlive("generate", "--prompt", "one", "--json", "report.json")
    assert (code, out) == (0, ""), err
    with open("report.json", encoding="utf-8") as file:
        check_schema(json.load(file))
    assert sorted(os.listdir()) == ["out.mp4", "report.json"]


@pytest.mark.parametrize("chunk", [1, 4])
def test_ctrl_c_leaves_a_playable_file_and_its_report(longlive, chunk):
    code, out, err = longlive(
        "generate", "--prompt", "a dot", "--json", "-", model=fake.Model(interrupt_at=chunk)
    )
    assert code == 130
    made = 9 + 12 * (chunk - 1)
    frames = read("out.mp4")
    assert len(frames) == made
    assert np.abs(frames[-1].astype(int) - 40 * (chunk - 1)).max() <= 4
    assert json.loads(out)["frames"] == made
    assert "stopped early" in err
    assert os.listdir() == ["out.mp4"]


def test_ctrl_c_before_the_first_chunk_leaves_nothing(longlive):
    code, _, err = longlive("generate", "--prompt", "a dot", model=fake.Model(interrupt_at=0))
    assert code == 130
    assert err.endswith("longlive: stopped\n")
    assert os.listdir() == []


BAD = {
    "no prompt": ([], "the prompt is empty"),
    "blank prompt": (["--prompt", " \t"], "the prompt is empty"),
    "no length": (["--prompt", "x", "--seconds", "0"], "--seconds must be a number above 0"),
    "negative length": (["--prompt", "x", "--seconds", "-3"], "--seconds must be"),
    "endless": (["--prompt", "x", "--seconds", "inf"], "--seconds must be"),
    "no number": (["--prompt", "x", "--seconds", "ten"], "--seconds=ten"),
    "less than a frame": (["--prompt", "x", "--seconds", "0.01"], "0.01 s at 16 FPS"),
    "past the end": (["--prompt", "x", "--at", "12: y"], '"y" at 12 s is past the end'),
    "at the end": (["--prompt", "x", "--cut", "10: y"], "past the end of a video of 10 s"),
    "before the start": (["--prompt", "x", "--at", "-1: y"], "before the start"),
    "after the last chunk began": (["--prompt", "x", "--at", "9.9: y"], "last chunk begins at 9.5"),
    "no colon": (["--prompt", "x", "--at", "5"], "SECONDS: PROMPT"),
    "no time": (["--prompt", "x", "--at", "soon: y"], "SECONDS: PROMPT"),
    "not a time": (["--prompt", "x", "--at", "nan: y"], "SECONDS: PROMPT"),
    "no new prompt": (["--prompt", "x", "--cut", "5: "], "no prompt after the colon"),
    "two at once": (["--prompt", "x", "--at", "5: y", "--cut", "5.0: z"], "at 5 s"),
    "unknown model": (["--prompt", "x", "--model", "huge"], 'unknown model "huge"'),
    "no such folder": (["--prompt", "x", "--output", "no/out.mp4"], "there is no folder no"),
    "a folder": (["--prompt", "x", "--output", "taken.mp4"], "is not a file"),
    "a device": (["--prompt", "x", "--output", "/dev/null"], "must end in .mp4"),
    "unknown format": (["--prompt", "x", "--output", "out.avi"], "must end in .mp4"),
    "unwritable": (["--prompt", "x", "--output", "/proc/out.mp4"], "cannot write /proc/out.mp4"),
    "unwritable report": (["--prompt", "x", "--json", "no/report.json"], "there is no folder no"),
    "unknown flag": (["--promt", "x"], "promt"),
    "unquoted": (["--prompt", "a", "dot"], '"dot"'),
    "no steps": (["--prompt", "x", "--steps", "0"], "--steps=0"),
    "negative seed": (["--prompt", "x", "--seed", "-1"], "--seed=-1"),
    "no session": (["--resume", "nowhere"], "there is no session in nowhere"),
    "no picture": (["--prompt", "x", "--image", "no.png"], "there is no file no.png"),
    "no script": (["--script", "no.json"], "cannot read no.json"),
    "told twice": (["--prompt", "x", "--script", "s.json"], "is told by --script s.json"),
    "kept and re-read": (
        ["--prompt", "x", "--recache", "keep", "--sinks", "first"],
        "--sinks is about a memory that is re-read",
    ),
    "unknown way": (["--prompt", "x", "--recache", "magic"], "magic"),
}


@pytest.mark.parametrize(("arguments", "reason"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_code_2(longlive, arguments, reason):
    os.mkdir("taken.mp4")
    code, out, err = longlive("generate", *arguments)
    assert code == 2
    assert out == ""
    assert reason in err
    assert err.startswith("longlive: ")
    assert err.count("\n") == 1
    assert os.listdir() == ["taken.mp4"]


def test_what_the_model_refuses_is_a_sentence_too(longlive):
    @dataclasses.dataclass
    class Refusing(fake.Model):
        def session(self, *_, **__):
            raise InputError("this model knows no such steps")

    code, _, err = longlive("generate", "--prompt", "x", model=Refusing())
    assert (code, err) == (2, "longlive: this model knows no such steps\n")
    assert os.listdir() == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is full")
class FullPart(output.Part):
    """The unfinished file of a video is on a device that takes nothing."""

    def __init__(self, target, **options):
        super().__init__(target, **options)
        if target.suffix == ".mp4":
            self.path.unlink()
            self.path.symlink_to("/dev/full")


def test_no_space_left_is_a_sentence_and_leaves_nothing(longlive, monkeypatch):
    monkeypatch.setattr(output, "Part", FullPart)
    model = fake.Model(noise=True)
    code, _, err = longlive("generate", "--prompt", "x", "--seconds", "60", model=model)
    assert code == 2
    assert err == "longlive: cannot write out.mp4: no space left on device\n"
    assert os.listdir() == []


@pytest.mark.parametrize("arguments", [(), ("--help",), ("generate", "--help"), ("bench", "-h")])
def test_help_lists_what_there_is(longlive, arguments):
    code, out, err = longlive(*arguments)
    assert (code, err) == (0, "")
    wanted = {(): ["generate", "bench", "eval"], ("--help",): ["generate", "bench", "eval"]}
    for word in wanted.get(arguments, ["--seed", "--steps", "--model", "--json"]):
        assert word in out


def test_version(longlive):
    assert longlive("--version")[:2] == (0, "longlive-jax 0.1.0\n")


def test_an_unknown_command_is_named(longlive):
    code, _, err = longlive("serenade")
    assert code == 2
    assert "serenade" in err and "generate" in err


def test_bench_prints_a_table_and_writes_the_same_schema(longlive):
    code, out, _ = longlive("bench", "--seconds", "3", "--repeat", "1", "--json", "bench.json")
    assert code == 0
    assert "end_to_end_fps" in out
    with open("bench.json", encoding="utf-8") as file:
        check_schema(json.load(file))


def test_bench_needs_two_chunks(longlive):
    code, _, err = longlive("bench", "--seconds", "0.5")
    assert code == 2
    assert "one chunk" in err


def test_eval_hands_model_steps_and_seed_to_the_suite(longlive, monkeypatch):
    def toy(model, steps, seed):
        return {"fps": model.config.fps, "given": [steps, seed]}

    monkeypatch.setattr("longlive_jax.eval.run.toy", toy)
    code, out, err = longlive("eval", "--suite", "toy", "--steps", "4", "--seed", "1")
    assert code == 0, err
    assert json.loads(out) == {"fps": 16, "given": [4, 1]}
    assert longlive("eval", "--json", "scores.json")[:2] == (0, "")
    assert os.listdir() == ["scores.json"]
    code, _, err = longlive("eval", "--suite", "chess")
    assert code == 2
    assert "chess" in err


def test_bad_input_is_answered_without_loading_jax(tmp_path):
    script = (
        "import sys; from longlive_jax import cli; "
        "code = cli.run(['generate', '--prompt', '']); "
        "sys.exit(code + 10 * ('jax' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, ".cache/longlive-jax"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, ".cache/longlive-jax"),
        ("darwin", {}, "Library/Caches/longlive-jax"),
    ],
)
def test_the_cache_is_where_the_system_keeps_caches(monkeypatch, platform, environment, expected):
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(cache_dir.user_cache(environment, platform)) == f"/home/someone/{expected}"


def test_the_cache_follows_xdg(tmp_path):
    folder = cache_dir.user_cache({"XDG_CACHE_HOME": str(tmp_path)}, "linux")
    assert folder == tmp_path / "longlive-jax"


def test_a_second_start_loads_what_the_first_compiled(tmp_path):
    script = (
        "from longlive_jax import bench, cache_dir; import jax, jax.numpy as jnp, sys; "
        "cache_dir.enable(); hits = []; "
        "jax.monitoring.register_event_listener(lambda event, **_: hits.append(event)); "
        "jax.jit(lambda x: jnp.tanh(x) @ x)(jnp.ones((8, 8))); "
        "sys.exit(hits.count('/jax/compilation_cache/cache_hits'))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    hits = [
        subprocess.run([sys.executable, "-c", script], env=environment).returncode for _ in range(2)
    ]
    assert hits[0] == 0
    assert hits[1] >= 1
    assert os.listdir(tmp_path / "longlive-jax" / "xla")


@pytest.mark.parametrize("seconds", [0.3, 1.0, 7.77, 60.0])
def test_chunks_tile_the_video(seconds):
    frames = timeline.frame_count(fake.CONFIG, seconds)
    lengths = [len(chunk) for chunk in fake.Model().session("x").stream(seconds)]
    assert sum(lengths) == frames == round(seconds * 16)
    assert lengths[0] == min(9, frames)
    assert set(lengths[1:-1]) <= {12}
    assert len(lengths) == timeline.chunk_count(fake.CONFIG, seconds)


def test_a_flag_may_be_written_with_dashes():
    """As most commands have them; what stands after the sign is left alone."""
    values = flags.FlagValues()
    flags.DEFINE_bool("random_weights", False, "", flag_values=values)
    flags.DEFINE_string("save-session", None, "", flag_values=values)
    for word, meant in {
        "--random-weights": "--random_weights",
        "--random-weights=true": "--random_weights=true",
        "--save-session=a-b": "--save-session=a-b",
        "--no-such": "--no-such",
        "random-weights": "random-weights",
    }.items():
        assert cli.spelled(word, values) == meant
