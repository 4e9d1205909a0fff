"""Stories from files: every format, where its prompts land, and what is said of a broken one."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import pytest

from longlive_jax import config as configs
from longlive_jax import story, timeline
from longlive_jax.errors import InputError
from longlive_jax.events import CUT_PREFIX, Event
from longlive_jax.story import Segments, Shots, Story

PRESETS = [configs.TINY, configs.WAN21_T2V_1_3B, configs.WAN22_TI2V_5B]
BY_NAME = pytest.mark.parametrize("config", PRESETS, ids=[preset.name for preset in PRESETS])


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Writes files of the given names into an empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)

    def write(contents: dict[str, str | bytes]):
        for name, content in contents.items():
            path = pathlib.Path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def read(name, **choices):
    return story.read(pathlib.Path(name), **choices)


def lasting(config, chunks):
    """Seconds of so many whole chunks."""
    return timeline.first_frame(config, chunks * config.stream.chunk) / config.fps


def chunk_prompts(made, config):
    """The prompt of every chunk as LongLive 2.0 lists them: a cut is marked in its first chunk."""
    total = timeline.frame_count(config, made.seconds)
    waiting, prompt, listed = list(made.events), made.prompt, []
    for first in [0, *timeline.chunk_starts(config, total)]:
        marked = ""
        while waiting and waiting[0].time_s * config.fps <= first:
            event = waiting.pop(0)
            prompt, marked = event.prompt, CUT_PREFIX if event.kind == "cut" else ""
        listed.append(marked + prompt)
    assert not waiting
    return listed


def chunk_of(event, config):
    """The chunk at which an event applies: the first one that begins at or after its time."""
    starts = [0, *timeline.chunk_starts(config, 10**6)]
    chunk = next(n for n, first in enumerate(starts) if event.time_s * config.fps <= first)
    assert chunk == 0 or event.time_s * config.fps > starts[chunk - 1]
    return chunk


STORY = {
    "prompt": " a cat sits in tall grass ",
    "seconds": 20,
    "seed": 7,
    "image": "media/cat.png",
    "events": [{"at": 8.5, "cut": "a dog runs"}, {"at": 5, "switch": "the cat stands up "}],
}


def test_a_whole_story(files):
    files({"day/story.json": json.dumps(STORY), "day/media/cat.png": b""})
    assert read("day/story.json") == [
        Story(
            prompt="a cat sits in tall grass",
            seconds=20,
            events=(Event(5, "switch", "the cat stands up"), Event(8.5, "cut", "a dog runs")),
            seed=7,
            image=pathlib.Path("day/media/cat.png"),
            name="story",
        )
    ]


def test_a_story_written_again_reads_the_same(files):
    files({"one.json": json.dumps(STORY | {"image": "cat.png"}), "cat.png": b""})
    (first,) = read("one.json")
    events = [{"at": event.time_s, event.kind: event.prompt} for event in first.events]
    data = dataclasses.asdict(first) | {"events": events, "image": str(first.image)}
    del data["name"], data["video"]
    files({"two.json": json.dumps(data)})
    assert read("two.json") == [dataclasses.replace(first, name="two")]


def test_only_the_prompt_must_be_there(files):
    files(
        {"s.json": '\ufeff{"prompt": "a café"}', "v.JSON": '{"prompt": "x", "video": "clip.mp4"}'}
    )
    files({"clip.mp4": b""})
    assert read("s.json") == [Story("a café", name="s")]
    assert read("v.JSON") == [Story("x", video=pathlib.Path("clip.mp4"), name="v")]


def test_the_documented_example_is_one(files):
    lines = story.__doc__.split("\n\n")
    (example,) = [text for text in lines if text.strip().startswith("{")]
    files({"story.json": example, "cat.png": b""})
    (made,) = read("story.json")
    assert [event.kind for event in made.events] == ["switch", "cut"]


@BY_NAME
def test_a_length_is_asked_for_or_written_or_ten_seconds(config):
    assert Story("x").place(config).seconds == 10
    assert Story("x", 20).place(config).seconds == 20
    assert Story("x", 20).place(config, 3).seconds == 3


def test_a_prompt_a_line(files):
    files({"many.txt": "one \r\n\r\n  \n two: 2\n", "single.txt": "line b\n"})
    assert read("many.txt") == [Story("one", name="many-000"), Story("two: 2", name="many-001")]
    assert read("single.txt") == [Story("line b", name="single")]


def test_a_line_is_the_prompt_of_every_chunk(files):
    # MultiTextConcatDataset(txt), num_blocks 3
    files({"p.txt": "line a\nline b\n"})
    config = configs.WAN22_TI2V_5B
    placed = read("p.txt")[1].place(config, lasting(config, 3))
    assert chunk_prompts(placed, config) == ["line b"] * 3


SIX = json.dumps({"prompts": ["a", "b ", "c", "d", "e", "f"], "id": 3})


def test_switches_are_where_the_published_configuration_has_them(files):
    # longlive_interactive_inference.yaml: switch_frame_indices 40, 80, ..., num_output_frames 240
    files({"i.jsonl": f"{SIX}\n\n{SIX}\n"})
    config = configs.WAN21_T2V_1_3B
    drafts = read("i.jsonl")
    assert [draft.name for draft in drafts] == ["i-000", "i-001"]
    given = read("i.jsonl", switch_frames=[40, 80, 120, 160, 200])
    for draft in [*drafts, *given]:
        made = draft.place(config)
        assert timeline.frame_count(config, made.seconds) == 240 * 4 - 3
        assert (made.prompt, made.name) == ("a", draft.name)
        assert [(event.kind, event.prompt) for event in made.events] == [
            ("switch", prompt) for prompt in "bcdef"
        ]
        # The first chunks of three latent frames that begin at or after them.
        assert [chunk_of(event, config) for event in made.events] == [14, 27, 40, 54, 67]


@BY_NAME
def test_a_segment_lasts_ten_seconds(config):
    made = Segments(("a", "b", "c")).place(config)
    slack = config.frames_per_chunk / config.fps
    for number, event in enumerate(made.events, 1):
        assert abs(event.time_s - 10 * number) < slack
    assert abs(made.seconds - 30) < 0.2


def test_one_chunk_holds_one_switch():
    # "if next_switch_pos is not None and current_start_frame >= next_switch_pos", once a chunk
    config = configs.WAN21_T2V_1_3B
    made = Segments(("a", "b", "c", "d"), (1, 2, 3)).place(config)
    assert [chunk_of(event, config) for event in made.events] == [1, 2, 3]


def test_a_shorter_video_leaves_out_the_end():
    config = configs.WAN21_T2V_1_3B
    assert [event.prompt for event in Segments(("a", "b", "c")).place(config, 15).events] == ["b"]
    assert Segments(("a", "b", "c")).place(config, 5).events == ()
    assert Segments(("a",)).place(config).seconds == pytest.approx(10, abs=0.2)


def captions(folder, names):
    return {f"{folder}/{name}.json": json.dumps({"caption": f"c{name}"}) for name in names}


SAMPLES = {
    **captions("root/caption/a", "012"),
    **captions("root/caption/b", "012"),
    "root/caption/b/shot_durations.txt": "2,\n 3\n",
    **captions("root/caption/d", ["10", "2", "i"]),
    "root/caption/d/global.json": "not read",
    "root/caption/notes.txt": "not read",
    "root/video/a/0.mp4": "not read",
}
# MultiTextConcatDataset of the original code: folder, num_blocks, chunks_per_shot, and the prompts
# it gave, as (caption, chunks).
WORKED = [
    ("a", 12, 4, [("c0", 4), ("c1", 4), ("c2", 4)]),
    ("b", 12, 4, [("c0", 2), ("c1", 10)]),
    ("d", 12, 4, [("ci", 4), ("c2", 4), ("c10", 4)]),
    ("a", 8, 0, [("c0", 3), ("c1", 3), ("c2", 2)]),
    ("b", 8, 0, [("c0", 2), ("c1", 6)]),
    ("d", 8, 0, [("ci", 3), ("c2", 3), ("c10", 2)]),
    ("a", 5, 4, [("c0", 4), ("c1", 1)]),
    ("b", 5, 4, [("c0", 2), ("c1", 3)]),
    ("d", 5, 4, [("ci", 4), ("c2", 1)]),
]


@BY_NAME
@pytest.mark.parametrize(("folder", "blocks", "each", "shots"), WORKED)
def test_captions_are_dealt_out_as_by_the_original_code(files, config, folder, blocks, each, shots):
    files(SAMPLES)
    wanted = []
    for caption, chunks in shots:
        wanted += [CUT_PREFIX + caption if wanted else caption, *[caption] * (chunks - 1)]
    drafts = read("root", chunks_per_shot=each)
    assert [draft.name for draft in drafts] == ["a", "b", "d"]
    (draft,) = [draft for draft in drafts if draft.name == folder]
    made = draft.place(config, lasting(config, blocks))
    assert chunk_prompts(made, config) == wanted
    assert {event.kind for event in made.events} == {"cut"}
    # The sample alone, and a root without `caption`, are the same.
    assert read(f"root/caption/{folder}", chunks_per_shot=each) == [draft]
    assert draft in read("root/caption", chunks_per_shot=each)


@BY_NAME
def test_shots_last_as_long_as_their_files_say(config):
    made = Shots(("a", "b"), (2, 3)).place(config)
    assert chunk_prompts(made, config) == ["a", "a", CUT_PREFIX + "b", "b", "b"]
    assert Shots(("a", "b")).place(config).seconds == 10


@BY_NAME
def test_captions_without_a_chunk_are_left_out(config):
    made = Shots(("a", "b", "c")).place(config, lasting(config, 2))
    assert chunk_prompts(made, config) == ["a", CUT_PREFIX + "b"]


def pictured(folder, **prompts):
    """Files of a folder of pictures, without bytes, and their prompts."""
    split = f"{folder}/images", f"{folder}/prompts"
    images, texts = (folder, folder) if folder.startswith("flat") else split
    return {
        **{f"{images}/{name}.png": b"" for name in prompts},
        **{f"{texts}/{name}.txt": text for name, text in prompts.items()},
    }


@BY_NAME
@pytest.mark.parametrize("folder", ["split", "flat"])
def test_a_picture_and_its_prompt_are_a_video(files, config, folder):
    """As `ImagePromptDataset` of LongLive 2.0 deals lines out."""
    files(pictured(folder, cat="a cat\r\n", dog="\ufeffa dog\n\nit swims\nit sleeps"))
    cat, dog = (draft.place(config, lasting(config, 8)) for draft in read(folder))
    place = folder if folder == "flat" else f"{folder}/images"
    assert (cat.image, dog.image) == (
        pathlib.Path(place, "cat.png"),
        pathlib.Path(place, "dog.png"),
    )
    assert chunk_prompts(cat, config) == ["a cat"] * 8
    shots = [["a dog"] * 3, [f"{CUT_PREFIX}it swims"], ["it swims"] * 2]
    shots += [[f"{CUT_PREFIX}it sleeps", "it sleeps"]]
    assert chunk_prompts(dog, config) == sum(shots, [])


@pytest.mark.parametrize("kind", [".png", ".JPG", ".jpeg", ".webp", ".BMP"])
def test_pictures_of_every_kind_that_is_read_there(files, kind):
    files({f"s/images/a{kind}": b"", "s/prompts/a.txt": "x", "s/prompts/b.txt": "y"})
    (found,) = read("s")
    assert (found.image, found.captions) == (pathlib.Path(f"s/images/a{kind}"), ("x",))


def test_prompts_may_lie_apart_from_pictures_that_do_not(files):
    files({"s/a.png": b"", "s/prompts/a.txt": "x", "t/images/a.png": b"", "t/images/a.txt": "y"})
    assert [draft.captions for name in "st" for draft in read(name)] == [("x",), ("y",)]


def test_a_picture_beside_captions_is_no_story(files):
    files({**captions("s", "0"), "s/preview.png": b"", **captions("t/a", "0"), "t/x.jpg": b""})
    for name in "st":
        (found,) = read(name)
        assert isinstance(found, Shots) and found.image is None


def test_pictures_are_inputs_that_nothing_overwrites(files):
    files(pictured("s", cat="a cat"))
    assert [story.files(draft) for draft in read("s")] == [[pathlib.Path("s/images/cat.png")]]


def test_lengths_of_shots_that_there_are_none_of_are_not_read(files):
    files({**captions("s", "01"), "s/shot_durations.txt": "6 6 6 6"})
    assert read("s") == [Shots(("c0", "c1"), (6, 6), "s")]
    files({"s/shot_durations.txt": " \n"})
    assert read("s", chunks_per_shot=3) == [Shots(("c0", "c1"), (3, 3), "s")]


@pytest.mark.parametrize("fps", [None, 7, 25, 30, 60])
@BY_NAME
def test_what_is_placed_at_a_chunk_applies_at_that_chunk(config, fps):
    config = dataclasses.replace(config, fps=fps or config.fps)
    made = Shots(tuple(f"{n}" for n in range(200)), (1,) * 200).place(config)
    assert [chunk_of(event, config) for event in made.events] == list(range(1, 200))
    last = timeline.last_start(config, made.seconds)
    assert all(event.time_s <= last for event in made.events)


def test_outputs_are_numbered_where_there_are_several():
    assert story.outputs(pathlib.Path("a/out.mp4"), 1) == [pathlib.Path("a/out.mp4")]
    several = story.outputs(pathlib.Path("a/out.v2.mp4"), 1001)
    assert several[:2] == [pathlib.Path("a/out.v2-000.mp4"), pathlib.Path("a/out.v2-001.mp4")]
    assert several[-1] == pathlib.Path("a/out.v2-1000.mp4")


def one(**fields):
    return {"s.json": json.dumps({"prompt": "x", **fields})}


def event(**fields):
    return one(events=[{"at": 1, "cut": "y"}, fields])


BAD = {
    "no file": ({}, "s.json", "cannot read s.json: no such file"),
    "no such kind": ({"s.yaml": "x"}, "s.yaml", "s.yaml is no story: name a .json, .jsonl, .txt"),
    "nothing": ({"s.json": " \n"}, "s.json", "s.json is empty"),
    "no lines": ({"s.txt": "\n\n"}, "s.txt", "s.txt is empty"),
    "not UTF-8": ({"s.txt": b"caf\xe9"}, "s.txt", "s.txt is not in UTF-8"),
    "broken": ({"s.json": '{\n"prompt": "x"\n"seed": 1}'}, "s.json", "s.json, line 3 is not JSON"),
    "deep": ({"s.json": "[" * 10**5}, "s.json", "s.json is nested more than 64 deep"),
    "endless": ({"s.json": '{"seed": %s}' % ("9" * 5000)}, "s.json", "cannot be read as JSON"),
    "twice": ({"s.json": '{"prompt": "x", "prompt": "y"}'}, "s.json", '"prompt" is there twice'),
    "a list": ({"s.json": '["x"]'}, "s.json", 's.json must be an object {...} with "prompt"'),
    "no prompt": ({"s.json": "{}"}, "s.json", 's.json has no "prompt": add words'),
    "blank prompt": (one(prompt=" "), "s.json", '"prompt" must be words, such as "a red circle"'),
    "number": (one(prompt=3), "s.json", 's.json: "prompt" must be words'),
    "unknown": (one(promt="x"), "s.json", 's.json knows no "promt", only "prompt", "seconds"'),
    "text as length": (one(seconds="20"), "s.json", '"seconds" must be a number of seconds above'),
    "no length": (one(seconds=0), "s.json", "above 0, not 0"),
    "null": (one(seconds=None), "s.json", "above 0, not null"),
    "nan": (one(seconds=math.nan), "s.json", "NaN is no number of JSON"),
    "infinite": ({"s.json": '{"prompt": "x", "seconds": 1e999}'}, "s.json", "not Infinity"),
    "huge": (one(seconds=10**400), "s.json", "above 0, not 1000"),
    "truth": (one(seconds=True), "s.json", "above 0, not true"),
    "half a seed": (one(seed=1.5), "s.json", '"seed" must be a whole number from 0'),
    "big seed": (one(seed=2**32), "s.json", "to 4294967295, not 4294967296"),
    "negative seed": (one(seed=-1), "s.json", "not -1"),
    "no image": (one(image="no.png"), "s.json", 's.json: "image": there is no file no.png'),
    "a folder": (one(video="."), "s.json", 's.json: "video": there is no file .'),
    "unnamed": (one(image=""), "s.json", '"image" must be the name of a file, not ""'),
    "two starts": (one(image="a", video="b"), "s.json", 'has both "image" and "video"'),
    "events": (one(events={"at": 5}), "s.json", '"events" must be a list of {"at": SECONDS'),
    "event": (one(events=["5: y"]), "s.json", 's.json: event 1 must be an object {...} with "at"'),
    "no time": (event(switch="z"), "s.json", 's.json: event 2 has no "at"'),
    "no kind": (event(at=2), "s.json", 'event 2 must have either "switch" or "cut"'),
    "both": (event(at=2, cut="y", switch="z"), "s.json", 'must have either "switch" or "cut"'),
    "odd event": (event(at=2, fade="z"), "s.json", 'event 2 knows no "fade", only "at"'),
    "before": (event(at=-1, cut="z"), "s.json", '"at" must be a number of seconds, 0 or more'),
    "never": (event(at=math.inf, cut="z"), "s.json", "Infinity is no number of JSON"),
    "when": (event(at="2", cut="z"), "s.json", '0 or more, not "2"'),
    "silent": (event(at=2, cut=" "), "s.json", 'event 2: "cut" must be words'),
    "at once": (event(at=1, cut="z"), "s.json", "s.json: two prompts are to change at 1 s"),
    "late": (one(seconds=3, events=[{"at": 3, "cut": "z"}]), "s.json", "past the end of a video"),
    "no object": ({"s.jsonl": f"{SIX}\n[]"}, "s.jsonl", "s.jsonl, line 2 must be an object"),
    "no prompts": ({"s.jsonl": "{}"}, "s.jsonl", 's.jsonl, line 1 has no "prompts"'),
    "none": ({"s.jsonl": '{"prompts": []}'}, "s.jsonl", '"prompts" must be a list of prompts'),
    "blank": ({"s.jsonl": '{"prompts": ["a", ""]}'}, "s.jsonl", "must be a list of prompts"),
    "bad line": ({"s.jsonl": f"{SIX}\n\n{{"}, "s.jsonl", "s.jsonl, line 3 is not JSON"),
    "no captions": ({"s/x.txt": "x"}, "s", 's holds no captions: write {"caption": "..."}'),
    "one without": ({**captions("s/a", "0"), "s/b/c": ""}, "s", "s/b holds no captions"),
    "a bad caption": ({"s/0.json": "{"}, "s", "s/0.json, line 1 is not JSON"),
    "no caption": ({"s/0.json": '{"title": "x"}'}, "s", 's/0.json has no "caption"'),
    "blank caption": ({"s/0.json": '{"caption": ""}'}, "s", '"caption" must be words'),
    "half": ({**captions("s", "0"), "s/shot_durations.txt": "2.5"}, "s", '"2.5" is no number'),
    "no text": ({"s/images/a.png": b""}, "s", "a.png has no prompt: write what to show into s/"),
    "no text beside": ({"s/a.png": b""}, "s", "s/a.png has no prompt: write what to show into s/a"),
    "empty text": (pictured("s", a=" \n"), "s", "s/prompts/a.txt is empty"),
    "no pictures": ({"s/images/a.gif": b""}, "s", "s/images holds no pictures: put .png"),
    "zero": ({**captions("s", "0"), "s/shot_durations.txt": "4, 0"}, "s", '"0" is no number'),
}


@pytest.mark.parametrize(("contents", "name", "reason"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(files, contents, name, reason):
    files(contents)
    with pytest.raises(InputError) as caught:
        read(name)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("frames", [[0, 40], [80, 40], [40, 40], [-1]])
def test_switches_rise(frames):
    with pytest.raises(InputError, match="must rise from above 0"):
        read("s.jsonl", switch_frames=frames)


def test_switches_fit_their_prompts(files):
    files({"s.jsonl": SIX})
    with pytest.raises(InputError, match="line 1 has 6 prompts: give 5 latent frames .* not 2"):
        read("s.jsonl", switch_frames=[40, 80])


def test_a_shot_has_chunks():
    with pytest.raises(InputError, match="1 chunk or more, not -1"):
        read("s", chunks_per_shot=-1)


def test_reading_needs_no_jax():
    script = "import sys; from longlive_jax import story; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
