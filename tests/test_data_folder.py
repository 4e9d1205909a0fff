"""Folders of videos: what is found in them, and that the frames asked for are the ones read."""

import dataclasses
import json
import pathlib

import av
import numpy as np
import pytest
from test_media import IDENTITY, TURNED, counted, film

from longlive_jax.data import folder, montage, toy_folder, toy_world
from longlive_jax.data.caption import parse
from longlive_jax.errors import InputError
from longlive_jax.eval import toy
from longlive_jax.events import CUT_PREFIX
from longlive_jax.media import read_clip
from longlive_jax.story import Shots
from longlive_jax.story import read as read_story

CHUNKS = 6
CFG = montage.MontageConfig(chunks=CHUNKS, chunk=3, fps=toy_world.FPS)
SIZE = (toy_world.SIZE, toy_world.SIZE)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three samples of the toy world as files, and the scripts that they show."""
    root = tmp_path_factory.mktemp("world") / "toy"
    return root, toy_folder.write(root, seed=4, samples=3, chunks=CHUNKS)


def test_the_toy_world_comes_back_from_files(world):
    root, scripts = world
    samples = folder.samples(root)
    assert [sample.name for sample in samples] == ["00000", "00001", "00002"]
    cuts = 0
    for sample, script in zip(samples, scripts, strict=True):
        plan = montage.plan(folder.clips(sample), CFG)
        wanted = []
        for chunk in range(CHUNKS):
            segment = script.segment(toy_world.chunk_start(chunk))
            text = segment.caption.removeprefix(CUT_PREFIX)
            new = chunk > 0 and segment.start == toy_world.chunk_start(chunk)
            wanted.append(CUT_PREFIX + text if new else text)
            cuts += new
        assert (list(plan.prompts), plan.valid) == (wanted, CFG.latents)
        shown = folder.frames(sample, plan, CFG, *SIZE)
        rendered = toy_world.render(script, CFG.frames)
        assert shown.shape == rendered.shape
        assert np.abs(shown.astype(int) - rendered).mean() < 4
    assert cuts >= 3


def test_the_judge_reads_what_the_captions_say(world):
    root, _ = world
    read = 0
    for sample in folder.samples(root):
        for video in sample.videos:
            said = parse(folder.caption(sample.caption_file(video)))
            frames = len(folder.footage(video).times)
            if len(said.things) == 1 and frames >= 12:
                assert toy.read(folder.read(video, range(frames), *SIZE)) == said
                read += 1
    assert read >= 5


def test_the_captions_tell_a_story_of_the_same_shots(world):
    root, scripts = world
    for draft, script in zip(read_story(root), scripts, strict=True):
        said = tuple(segment.caption.removeprefix(CUT_PREFIX) for segment in script.segments)
        begins = [chunk for chunk, _, _ in script.events()]
        lengths = tuple(np.diff([*begins, CHUNKS]).tolist())
        assert draft == Shots(said, lengths, draft.name)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(toy_world, "render", broken)
    with pytest.raises(InputError, match="cannot write .*toy: no space left"):
        toy_folder.write(tmp_path / "toy", seed=0, samples=1, chunks=2)
    assert list(tmp_path.iterdir()) == []


def test_padding_repeats_the_last_frame(world):
    root, _ = world
    (sample, *_) = folder.samples(root)
    longer = dataclasses.replace(CFG, chunks=CHUNKS + 2, pad=True)
    plan = montage.plan(folder.clips(sample), longer)
    shown = folder.frames(sample, plan, longer, *SIZE)
    assert plan.valid == CFG.latents
    assert (shown[CFG.frames :] == shown[CFG.frames - 1]).all()


CODECS = {
    "a.mp4": dict(codec="libx264"),
    "a.mkv": dict(codec="libx264"),
    "a.avi": dict(codec="mpeg4"),
    "a.webm": dict(codec="libvpx-vp9"),
}


@pytest.mark.parametrize("name", CODECS)
def test_a_range_is_what_a_whole_reading_has_there(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 48, 3), np.uint8)
    path = film(tmp_path / name, list(noise), **CODECS[name])
    assert len(folder.footage(path).times) == 40
    whole = folder.read(path, range(40), 32, 48)
    for first in (0, 1, 13, 31):
        some = [first, first, first + 2, first + 3, first + 8]
        np.testing.assert_array_equal(folder.read(path, some, 32, 48), whole[some])
    with pytest.raises(InputError, match="40 frames, not frame 40"):
        folder.read(path, [40], 32, 48)


def test_key_frames_inside_a_clip_are_where_reading_begins(tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, (600, 16, 16, 3), np.uint8)
    path = film(tmp_path / "a.mp4", list(noise))
    whole = folder.read(path, range(600), 16, 16)
    for first in (249, 250, 251, 505):
        some = [first, first + 1, first + 60]
        np.testing.assert_array_equal(folder.read(path, some, 16, 16), whole[some])


def test_the_last_frames_are_read_where_all_are_key_frames(tmp_path):
    path = film(tmp_path / "a.mkv", counted(50, (16, 16)), codec="mjpeg", pix_fmt="yuvj420p")
    for first in (40, 46, 48, 49):
        read = folder.read(path, range(first, 50), 16, 16)
        assert np.abs(read[:, 8, 8, 1].astype(int) - range(4 * first + 8, 208, 4)).max() <= 1


def test_frames_at_uneven_times_are_counted_as_they_come(tmp_path):
    times = [0, 40, 50, 200, 260, 300, 900, 930]
    frames = [np.full((16, 16, 3), 20 + 30 * i, np.uint8) for i in range(8)]
    path = film(tmp_path / "a.mkv", frames, times=times)
    read = folder.read(path, [1, 3, 6, 7], 16, 16)
    assert np.abs(read[:, 8, 8, 1].astype(int) - [50, 110, 200, 230]).max() <= 3


def test_frames_are_fitted_and_turned_as_clips_are(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), np.uint8)
    path = film(tmp_path / "a.mp4", list(noise), 25)
    content = path.read_bytes()
    place = content.index(IDENTITY, content.index(b"tkhd"))
    path.write_bytes(content[:place] + TURNED + content[place + len(TURNED) :])
    clip = read_clip(path, 40, 24, 25)
    assert "turned upright" in clip.note
    np.testing.assert_array_equal(folder.read(path, range(5, 20), 40, 24), clip.frames[5:])


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_videos_are_in_the_order_of_their_numbers(tmp_path):
    touch(tmp_path, *(f"video/s/{n}" for n in ("10.mp4", "9.MOV", "b.mp4", "a.webm", ".c.mp4")))
    touch(
        tmp_path,
        "video/s/notes.txt",
        "video/.hidden/0.mp4",
        "video/@eaDir/0.mp4",
        "video/s/._0.mp4",
        "caption/s/9.json",
        "video/a/x",
    )
    empty, sample = folder.samples(tmp_path)
    assert (empty.name, empty.videos) == ("a", ())
    assert [video.name for video in sample.videos] == ["9.MOV", "10.mp4", "a.webm", "b.mp4"]
    assert sample.caption_file(sample.videos[0]) == tmp_path / "caption" / "s" / "9.json"


@pytest.mark.parametrize("names", [[], ["video/s/0.mp4"], ["0.mp4"], ["caption/s/0.json"]])
def test_what_is_no_data_set_is_refused(tmp_path, names):
    touch(tmp_path, *names)
    with pytest.raises(InputError, match="is no data set: there is no folder .*: put|put shots"):
        folder.samples(tmp_path)


def test_a_data_set_without_samples_is_refused(tmp_path):
    touch(tmp_path, "video/0.mp4", "caption/0.json")
    with pytest.raises(InputError, match="video holds no folders"):
        folder.samples(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"caption": " a caf\xc3\xa9 "}', "a café"),
        (b'\xef\xbb\xbf{"caption": "x", "other": 3}', "x"),
        (b'{"caption": " "}', ""),
        (b"{}", ""),
        (None, ""),
    ],
)
def test_captions(tmp_path, content, said):
    if content is not None:
        (tmp_path / "0.json").write_bytes(content)
    assert folder.caption(tmp_path / "0.json") == said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"caption": "caf\xe9"}', "is not in UTF-8"),
        (b'{\n"caption": ', "line 2 is not JSON"),
        (b"[" * 10**5, "nested more than 64 deep"),
        (b'{"n": %s}' % (b"9" * 5000), "cannot be read as JSON"),
        (b'["x"]', "is not of the form"),
        (b'{"caption": 3}', "is not of the form"),
    ],
)
def test_a_caption_that_cannot_be_read_is_one_sentence(tmp_path, content, said):
    (tmp_path / "0.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        folder.caption(tmp_path / "0.json")
    assert said in str(caught.value)
    assert str(tmp_path / "0.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_video_without_a_caption_is_left_out(world):
    root, _ = world
    sample = max(folder.samples(root), key=lambda sample: len(sample.videos))
    videos = (*sample.videos, sample.videos[0].with_name("no.mp4"))
    clips = folder.clips(dataclasses.replace(sample, videos=videos))
    assert [clip.file for clip in clips] == [video.name for video in sample.videos]


def damaged(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "half":
        content = content[: len(content) // 2]
    if kind == "noise":
        middle = slice(len(content) // 3, len(content) * 2 // 3)
        size = middle.stop - middle.start
        content[middle] = np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes()
    if kind == "nothing":
        content = b""
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("kind", ["half", "noise", "nothing"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_damaged_video_is_refused(tmp_path, name, kind):
    noise = np.random.default_rng(0).integers(0, 256, (60, 32, 48, 3), np.uint8)
    path = film(tmp_path / name, list(noise))
    damaged(path, kind)
    with pytest.raises(InputError) as caught:
        folder.read(path, range(60), 32, 48)
    assert str(path) in str(caught.value)


def test_a_file_that_lacks_its_end_is_refused_before_it_is_decoded(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 32, 48, 3), np.uint8)
    path, first = film(tmp_path / "a.mp4", list(noise)), tmp_path / "b.mp4"
    # With its table of contents in front, a file that is half there can be opened.
    with av.open(path) as source, av.open(first, "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    damaged(first, "half")
    with pytest.raises(InputError, match="is cut short: .* of its 60 frames are there"):
        folder.footage(first)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read .*no such file"):
        folder.footage(pathlib.Path(tmp_path / "0.mp4"))
    (tmp_path / "0.json").write_text(json.dumps({"caption": "x"}))
    with pytest.raises(InputError, match="0.json is damaged, or no video"):
        folder.footage(tmp_path / "0.json")
