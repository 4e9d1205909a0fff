"""Frames of clips in the order in which they are shown, whatever containers say of their times."""

import pathlib

import av
import numpy as np
import pytest
from test_media import counted, film, numbers

from longlive_jax import clips, demux
from longlive_jax.config import TINY
from longlive_jax.data import check, folder
from longlive_jax.errors import InputError
from longlive_jax.media import read_clip

COUNT = 48
BITS = 6
REORDERED = {"bf": "3", "crf": "8", "preset": "veryfast"}


def coded(count, size=(32, 96)):
    """Frames with their numbers in six vertical bars, black or white: any codec keeps them."""
    frames = []
    for number in range(count):
        bits = [255 * (number >> bit & 1) for bit in range(BITS)]
        row = np.repeat(np.array(bits, np.uint8), size[1] // BITS)
        frames.append(np.broadcast_to(row[None, :, None], (*size, 3)).copy())
    return frames


def decoded(frames):
    width = frames.shape[2]
    bars = frames[:, frames.shape[1] // 2, width // BITS // 2 :: width // BITS, 1] > 127
    return (bars @ (1 << np.arange(BITS))).tolist()


def write(path, frames, codec, options=(), fps=16, pix_fmt="yuv420p"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=dict(options))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def remuxed(source, target, *, pts=lambda pts: pts, dts=lambda dts: dts):
    """The packets of a clip in another container, or with other time stamps."""
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        stream = read.streams.video[0]
        copy = written.add_stream_from_template(stream)
        for packet in read.demux(stream):
            if packet.size:
                packet.stream = copy
                packet.pts, packet.dts = pts(packet.pts), dts(packet.dts)
                written.mux(packet)
    return target


H264 = ("libx264", REORDERED)
MPEG4 = ("mpeg4", {"bf": "2", "b": "4M"})
MPEG2 = ("mpeg2video", {"bf": "2", "b": "4M"})
VP9 = ("libvpx-vp9", {"lag-in-frames": "16", "auto-alt-ref": "1", "b": "1M", "cpu-used": "8"})
KINDS = {
    **{f"h264.{suffix}": H264 for suffix in ("mp4", "mov", "mkv", "avi", "asf", "wmv", "ts")},
    **{f"h264.{suffix}": H264 for suffix in ("flv", "mpg", "nut", "h264")},
    **{f"mpeg4.{suffix}": MPEG4 for suffix in ("mp4", "mkv", "avi", "asf")},
    **{f"mpeg2.{suffix}": MPEG2 for suffix in ("avi", "asf", "ts", "mpg", "mkv")},
    **{f"vp9.{suffix}": VP9 for suffix in ("webm", "mkv", "mp4", "avi")},
    "vp8.webm": ("libvpx", {"lag-in-frames": "16", "auto-alt-ref": "1", "b": "1M"}),
    "mjpeg.avi": ("mjpeg", {}),
    "wmv2.wmv": ("wmv2", {"b": "4M"}),
    "ffv1.mkv": ("ffv1", {}),
    "hevc.mp4": ("libx265", {"preset": "ultrafast", "x265-params": "bframes=3:log-level=0"}),
    "hevc.ts": ("libx265", {"preset": "ultrafast", "x265-params": "bframes=3:log-level=0"}),
}


def readable(name):
    """Skip what PyAV 17 crashes on and what is refused there."""
    kind = {"flv": "flv", "mpg": "mpeg"}.get(name.rpartition(".")[2], "mp4")
    if kind not in demux.FORMATS:
        pytest.skip(f"this PyAV reads no {kind}")


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_read_once_and_in_order(tmp_path, name):
    readable(name)
    codec, options = KINDS[name]
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write(tmp_path / name, coded(COUNT), codec, options, pix_fmt=pix_fmt)
    clip = read_clip(path, 32, 96, 16)
    assert decoded(clip.frames) == list(range(COUNT))
    assert clip.note == ""
    assert len(folder.footage(path).times) == COUNT
    assert decoded(folder.read(path, range(3, COUNT), 32, 96)) == list(range(3, COUNT))
    assert decoded(folder.read(path, [29, 29, 41, COUNT - 1], 32, 96)) == [29, 29, 41, COUNT - 1]
    assert decoded(read_clip(path, 32, 96, 16, last=5).frames) == list(range(COUNT - 5, COUNT))


def test_h264_of_an_mp4_in_an_asf(tmp_path):
    """Its frames have lengths in place of start codes, which FFmpeg's parser stumbles over."""
    source = write(tmp_path / "a.mp4", coded(COUNT), *H264)
    clip = read_clip(remuxed(source, tmp_path / "a.asf"), 32, 96, 16)
    assert decoded(clip.frames) == list(range(COUNT))


def test_what_the_check_passes_training_reads(tmp_path):
    (tmp_path / "video/a").mkdir(parents=True)
    (tmp_path / "caption/a").mkdir(parents=True)
    path = write(tmp_path / "video/a/0.avi", coded(COUNT, (64, 66)), *H264)
    (tmp_path / "caption/a/0.json").write_text('{"caption": "bars"}')
    report = check.check(tmp_path, TINY)
    assert (report.usable, report.problems) == (1, ())
    assert decoded(folder.read(path, range(45), 64, 66)) == list(range(45))


@pytest.mark.parametrize("parts", [2, 3])
def test_joined_transport_streams_are_read_to_their_end(tmp_path, parts):
    one = write(tmp_path / "one.ts", coded(24), *H264).read_bytes()
    (tmp_path / "all.ts").write_bytes(one * parts)
    clip = read_clip(tmp_path / "all.ts", 32, 96, 16)
    assert decoded(clip.frames) == list(range(24)) * parts
    more = " (and 1 more)" if parts == 3 else ""
    assert clip.note == f"its clock restarts after 1.5 s: read on{more}"
    assert decoded(folder.read(tmp_path / "all.ts", [0, 23, 24, 25, 47], 32, 96)) == [
        *(0, 23, 0, 1, 23),
    ]


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "nut"])
@pytest.mark.parametrize(("gap", "said"), [(3600, "1:00:00"), (86400, "24:00:00")])
def test_a_gap_in_time_is_shortened(tmp_path, suffix, gap, said):
    times = [*range(0, 1000, 50), *range(1000 * gap + 950, 1000 * gap + 1950, 50)]
    path = film(tmp_path / f"a.{suffix}", counted(40), 20, times=times)
    clip = read_clip(path, 64, 64, 20)
    assert numbers(clip) == [*range(19), *[19] * 200, *range(20, 40)]
    assert f"a gap of {said} after 0.95 s is shortened to 10 s" in clip.note
    assert numbers(read_clip(path, 64, 64, 20, last=25)) == [*[19] * 5, *range(20, 40)]


def test_short_pauses_are_held(tmp_path):
    path = film(tmp_path / "a.mkv", counted(3), 20, times=[0, 9000, 9050])
    clip = read_clip(path, 64, 64, 1)
    assert numbers(clip)[:9] == [0] * 9 and "gap" not in clip.note


def test_time_stamps_in_disorder_are_passed_over(tmp_path):
    source = write(tmp_path / "a.mkv", coded(COUNT), "mjpeg", fps=20, pix_fmt="yuvj420p")
    order = np.random.default_rng(0).permutation(COUNT) * 50
    pts, dts = iter(order.tolist()), iter(range(-50 * COUNT, 0, 50))
    path = remuxed(source, tmp_path / "b.mkv", pts=lambda _: next(pts), dts=lambda _: next(dts))
    clip = read_clip(path, 32, 96, 20)
    assert decoded(clip.frames) == list(range(COUNT))
    assert clip.note == "its time stamps are in disorder: its frames follow each other at 20 FPS"
    same = remuxed(source, tmp_path / "c.mkv", pts=lambda _: 0, dts=lambda _: 0)
    clip = read_clip(same, 32, 96, 25)
    assert decoded(clip.frames) == list(range(COUNT))
    assert clip.note == "its time stamps are in disorder: its frames follow each other at 25 FPS"


def test_a_stream_that_begins_inside_a_group_of_pictures(tmp_path):
    """As recordings of broadcasts do: it is read from its first key frame on."""
    source = write(tmp_path / "a.ts", coded(COUNT), "libx264", REORDERED | {"g": "16"})
    with av.open(str(source)) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.size]
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    content = source.read_bytes()
    path = tmp_path / "b.ts"
    path.write_bytes(content[: 188 * 3] + content[packets[keys[1] // 2].pos :])
    shown = decoded(read_clip(path, 32, 96, 16).frames)
    assert shown == list(range(shown[0], COUNT)) and 0 < shown[0] <= 16


def test_the_end_of_a_clip_is_found_without_decoding_the_rest(tmp_path, monkeypatch):
    frames = [np.full((16, 16, 3), 20 + 2 * (i // 10), np.uint8) for i in range(1000)]
    path = write(tmp_path / "a.mp4", frames, "libx264", REORDERED | {"g": "50"}, 10)
    whole = read_clip(path, 16, 16, 10)
    count, real = [], clips.decode

    def counting(container, stream):
        for frame in real(container, stream):
            count.append(frame)
            yield frame

    monkeypatch.setattr(clips, "decode", counting)
    clip = read_clip(path, 16, 16, 10, last=30)
    np.testing.assert_array_equal(clip.frames, whole.frames[-30:])
    assert len(count) < 120
    assert clip.note == "only the last 3 s of its 1:40 are used"


@pytest.mark.parametrize("read", [lambda path: read_clip(path, 32, 32, 16), folder.footage])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".png"])
def test_a_file_without_a_byte_is_called_empty(tmp_path, read, suffix):
    path = pathlib.Path(tmp_path / f"a{suffix}")
    path.write_bytes(b"")
    with pytest.raises(InputError, match=f"{path} is empty"):
        read(path)
