"""Times are read alike in flags, in "TIME: PROMPT" and in stories."""

import json
import pathlib

import fake
import pytest

from longlive_jax import cli, events, story, times
from longlive_jax.errors import InputError

READ = {
    "5": 5.0,
    "5.25": 5.25,
    " 90 ": 90.0,
    "0:05": 5.0,
    "1:30": 90.0,
    "01:30": 90.0,
    "1:30.5": 90.5,
    "1:30,25": 90.25,
    "90:00": 5400.0,
    "1:02:03": 3723.0,
    "1:2:03": 3723.0,
    "0:01:30.5": 90.5,
    "00:00:01,500": 1.5,
}
SPLIT = {
    "5: a dot": (5.0, "a dot"),
    "5:a dot": (5.0, "a dot"),
    " 2.5 : a dot ": (2.5, "a dot"),
    "1:30: a dot": (90.0, "a dot"),
    "1:30:a dot": (90.0, "a dot"),
    "1:30 : a dot": (90.0, "a dot"),
    "1:02:03.5: a dot": (3723.5, "a dot"),
    "0:05,5: a dot": (5.5, "a dot"),
    "1: 30 birds": (1.0, "30 birds"),
    "1:30: 15 birds": (90.0, "15 birds"),
    "5: 30: a dot": (5.0, "30: a dot"),
    "5: note: a dot": (5.0, "note: a dot"),
    "1:30: note: a dot": (90.0, "note: a dot"),
    "5:3d glasses": (5.0, "3d glasses"),
    "1:75 birds": (1.0, "75 birds"),
    "1:30:15th of May": (90.0, "15th of May"),
    "5: a\nb": (5.0, "a\nb"),
    "-3: a dot": (-3.0, "a dot"),
}
REFUSED = {
    "1:75: x": "its seconds must be below 60",
    "1:60: x": "its seconds must be below 60",
    "1:90:00: x": "its minutes must be below 60",
    "1:5: x": '"1:5" is no time',
    "1:300: x": '"1:300" is no time',
    "-1:30: x": '"-1:30" is no time',
    "1.5:30: x": '"1.5:30" is no time',
    "1:2:03:04: x": "is no time",
    "1:30 birds": "can be read in two ways",
    "1:30, birds": "can be read in two ways",
    "1:02:03 birds": "can be read in two ways",
    "1:30": "has no prompt",
    "1:30: ": "has no prompt after the colon",
    "soon: x": 'is not of the form "SECONDS: PROMPT"',
    "nan: x": 'is not of the form "SECONDS: PROMPT"',
    "9" * 400 + ":00: x": "is not of the form",
    "": "is not of the form",
}


@pytest.mark.parametrize(("text", "seconds"), READ.items())
def test_a_time_is_read(text, seconds):
    assert times.read(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:5", "1:75", "-1:30", ":30", "1:", "1::30"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(InputError, match="is no time"):
        times.read(text)


@pytest.mark.parametrize(("text", "parts"), SPLIT.items())
def test_a_time_ends_where_its_prompt_begins(text, parts):
    assert times.split(text) == parts
    assert events.parse("cut", text) == events.Event(parts[0], "cut", parts[1])


@pytest.mark.parametrize(("text", "said"), REFUSED.items(), ids=lambda value: value[:20])
def test_a_bad_time_is_one_short_sentence(text, said):
    with pytest.raises(InputError) as caught:
        times.split(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def run(*arguments):
    model = fake.Model()
    assert cli.run(["generate", "--prompt", "one", *arguments], lambda name: model) == 0
    ((_, seconds, _, _, changes),) = model.calls
    return seconds, [(change.time_s, change.kind, change.prompt) for change in changes]


def test_minutes_in_every_flag_of_generate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = ["--at", "0:01: two", "--cut", "0:00:02.5: three", "--at", "1.5:four"]
    assert run("--seconds", "0:03.5", *changes) == (
        3.5,
        [(1.0, "switch", "two"), (1.5, "switch", "four"), (2.5, "cut", "three")],
    )


def test_a_switch_at_minutes_is_not_at_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--prompt", "one", "--seconds", "3", "--at", "1:30: two"]
    assert cli.run(["generate", *arguments], lambda name: fake.Model()) == 2
    assert '"two" at 90 s is past the end of a video of 3 s' in capsys.readouterr().err


def test_bad_lengths_are_one_sentence(capsys):
    assert cli.run(["generate", "--prompt", "x", "--seconds", "1:75"], fake.Model) == 2
    said = capsys.readouterr().err
    assert "--seconds=1:75" in said and "below 60" in said and said.count("\n") == 1


@pytest.mark.parametrize("command", ["bench", "eval", "plan", "generate"])
def test_every_length_on_the_command_line_is_a_time(command):
    from absl import flags

    values = flags.FlagValues()
    cli.COMMANDS[command].define(values)
    values(["longlive", "--seconds=1:30.5"])
    assert values.seconds == 90.5


def test_minutes_in_a_story(tmp_path):
    told = {
        "prompt": "one",
        "seconds": "1:40",
        "events": [{"at": "0:01:30.5", "cut": "three"}, {"at": "1:05", "switch": "two"}],
    }
    (tmp_path / "story.json").write_text(json.dumps(told))
    (found,) = story.read(tmp_path / "story.json")
    assert found.seconds == 100.0
    assert [event.time_s for event in found.events] == [65.0, 90.5]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seconds": "1:75"}, '"seconds": "1:75" is no time'),
        ({"seconds": "0:00"}, "above 0"),
        ({"events": [{"at": "1:5", "cut": "y"}]}, 'event 1: "at": "1:5" is no time'),
    ],
)
def test_bad_times_in_a_story_are_one_sentence(tmp_path, fields, said):
    path = pathlib.Path(tmp_path / "story.json")
    path.write_text(json.dumps({"prompt": "x", **fields}))
    with pytest.raises(InputError) as caught:
        story.read(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
