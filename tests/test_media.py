"""Pictures and clips in: sizes, colours, which way up, timing, and what is said of bad files."""

import os
import pathlib
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from longlive_jax.errors import InputError
from longlive_jax.media import read_clip, read_image
from longlive_jax.video import VideoWriter

COLOURS = np.array(
    [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50), (128, 128, 128), (20, 60, 220)],
    np.uint8,
)
CORNERS = np.zeros((32, 48, 3), np.uint8)  # red, green; blue, black
CORNERS[:16, :24, 0] = CORNERS[:16, 24:, 1] = CORNERS[16:, :24, 2] = 255
IDENTITY, TURNED = (
    b"".join(x.to_bytes(4, "big", signed=True) for x in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    for a, b, c, d in ((1 << 16, 0, 0, 1 << 16), (0, 1 << 16, -1 << 16, 0))
)


def chart(height=64, width=192):
    """Bars of known colours: uint8 [height, width, 3]."""
    return np.repeat(COLOURS[None], height, 0).repeat(width // len(COLOURS), 1)


def far_off(pixels):
    """The largest error in the middle of the bars of a chart."""
    height, width, _ = pixels.shape
    middles = pixels[height // 2, width // 12 :: width // 6]
    return np.abs(middles.astype(int) - COLOURS).max()


def still(path, array, format="rgb24", codec=None, pix_fmt=None, options=None):
    """Writes one picture without a container around it; returns its path."""
    names = {".png": "png", ".jpg": "mjpeg", ".webp": "libwebp", ".tiff": "tiff"}
    frame = av.VideoFrame.from_ndarray(array, format=format)
    coder = av.CodecContext.create(codec or names[path.suffix], "w")
    coder.width, coder.height, coder.time_base = frame.width, frame.height, Fraction(1, 25)
    coder.pix_fmt = pix_fmt or format
    coder.options = options or {}
    if path.suffix == ".jpg":
        coder.color_range = int(ColorRange.JPEG)
        frame = frame.reformat(format=coder.pix_fmt, dst_color_range=ColorRange.JPEG)
    elif coder.pix_fmt != format:
        frame = frame.reformat(format=coder.pix_fmt)
    frame.pts = 0
    path.write_bytes(b"".join(bytes(packet) for packet in coder.encode(frame) + coder.encode(None)))
    return path


def jpeg(path, array):
    return still(path, array, pix_fmt="yuvj420p", options={"qmin": "1", "qmax": "1"})


def film(path, frames, fps=30, *, times=None, tags=None, **settings):
    """Writes a clip; `times` are those of the frames in 1/1000 s. Returns its path."""
    settings = {"codec": "libx264", "pix_fmt": "yuv420p", "crf": "1"} | settings
    with av.open(str(path), "w") as container:
        stream = container.add_stream(settings["codec"], rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = settings["pix_fmt"]
        stream.options = {"crf": settings["crf"]} if settings["codec"] == "libx264" else {}
        stream.sample_aspect_ratio = settings.get("pixel", Fraction(1))
        matrix, extent = tags or (None, None)
        if tags:
            stream.codec_context.colorspace = int(matrix)
            stream.codec_context.color_range = int(extent)
        if times:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format=stream.pix_fmt, dst_colorspace=matrix, dst_color_range=extent
            )
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def counted(count, size=(64, 64)):
    """Frames that tell their number: grey levels 4 apart."""
    return [np.full((*size, 3), 4 * i + 8, np.uint8) for i in range(count)]


def numbers(clip):
    return [round((int(frame[5, 5, 1]) - 8) / 4) for frame in clip.frames]


def refused(read, path, *said):
    """Everything that is wrong is said in one sentence that names the file."""
    with pytest.raises(InputError) as caught:
        if read is read_clip:
            read(path, 32, 32, 16)
        else:
            read(path, 32, 32)
    message = str(caught.value)
    assert "\n" not in message
    for words in (*said, *([] if isinstance(path, np.ndarray) else [str(path)])):
        assert words in message


def test_a_picture_of_the_right_size_is_left_alone(tmp_path):
    picture = read_image(still(tmp_path / "a.png", CORNERS), 32, 48)
    np.testing.assert_array_equal(picture.frames, CORNERS[None])
    assert picture.note == ""
    own = read_image(CORNERS[:, ::-1], 32, 48)
    np.testing.assert_array_equal(own.frames, CORNERS[None, :, ::-1])
    assert own.note == ""


@pytest.mark.parametrize(
    ("size", "wanted", "note"),
    [
        ((1080, 1920), (480, 832), "1920x1080 scaled to 853x480, 21 columns cropped"),
        ((60, 40), (64, 64), "40x60 scaled to 64x96, 32 rows cropped"),
        ((64, 65), (64, 64), "1 column cropped"),
        ((32, 32), (64, 64), "32x32 scaled to 64x64"),
    ],
)
def test_a_picture_covers_the_frame_and_its_middle_is_kept(size, wanted, note):
    picture = read_image(np.full((*size, 3), 77, np.uint8), *wanted)
    assert picture.frames.shape == (1, *wanted, 3)
    assert picture.note == note
    assert (picture.frames == 77).all()


@pytest.mark.parametrize("scale", [1, 2, Fraction(1, 2)])
def test_what_is_cropped_is_the_border(scale):
    pixels = np.full((64, 128, 3), (0, 0, 255), np.uint8)
    pixels[:, :32] = pixels[:, -32:] = (255, 0, 0)
    size = int(64 * scale)
    frame = read_image(pixels, size, size).frames[0]
    assert np.abs(frame[:, 3:-3].astype(int) - (0, 0, 255)).max() <= 1
    np.testing.assert_array_equal(frame, frame[:, ::-1])  # not shifted by a part of a pixel


def test_shrinking_averages_and_growing_is_smooth():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    mean = noise.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(read_image(noise, 16, 16).frames[0] - mean).max() <= 1
    ramp = np.broadcast_to(np.arange(0, 256, 8, dtype=np.uint8)[None, :, None], (32, 32, 3))
    steps = np.diff(read_image(ramp, 128, 128).frames[0, 0, :, 0].astype(int))
    assert steps.min() >= 0 and steps.max() <= 3


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff"])
def test_pictures_have_the_colours_that_were_written(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".jpg":
        jpeg(path, chart())
    elif suffix == ".webp":
        still(path, chart(), pix_fmt="bgra", options={"lossless": "1"})
    else:
        still(path, chart())
    assert far_off(read_image(path, 64, 192).frames[0]) <= (2 if suffix == ".jpg" else 0)
    assert far_off(read_image(path, 32, 96).frames[0]) <= 2


@pytest.mark.parametrize("height", [64, 720])
@pytest.mark.parametrize("matrix", [Colorspace.ITU601, Colorspace.ITU709])
@pytest.mark.parametrize("extent", [ColorRange.MPEG, ColorRange.JPEG])
def test_clips_have_the_colours_that_their_tags_say(tmp_path, height, matrix, extent):
    frames = [chart(height, 2 * height // 6 * 6)]
    tagged = film(tmp_path / "a.mp4", frames, tags=(matrix, extent))
    assert far_off(read_clip(tagged, 64, 120, 16).frames[0]) <= 3


@pytest.mark.parametrize(("height", "matrix"), [(64, Colorspace.ITU601), (720, Colorspace.ITU709)])
def test_untagged_clips_are_taken_as_players_take_them(tmp_path, height, matrix):
    path = tmp_path / "a.avi"  # it has no place for tags, and neither has MPEG-4 part 2 here
    frame = av.VideoFrame.from_ndarray(chart(height, 2 * height // 6 * 6), format="rgb24")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = frame.height, frame.width, "yuv420p"
        stream.options = {"qmin": "1", "qmax": "1"}
        coded = frame.reformat(format="yuv420p", dst_colorspace=matrix)
        container.mux(stream.encode(coded) + stream.encode(None))
    assert far_off(read_clip(path, 64, 120, 16).frames[0]) <= 4


def test_grey_and_16_bit_pictures(tmp_path):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    grey = read_image(still(tmp_path / "a.png", ramp, "gray"), 64, 256).frames[0]
    assert (grey == ramp[..., None]).all()
    deep = still(tmp_path / "b.png", ramp.astype(np.uint16) * 257, "gray16be")
    assert np.abs(read_image(deep, 64, 256).frames[0].astype(int) - ramp[..., None]).max() <= 1
    deep = still(tmp_path / "c.png", chart().astype(np.uint16) * 257, "rgb48be")
    assert far_off(read_image(deep, 64, 192).frames[0]) <= 1


def test_transparent_parts_are_black_and_do_not_bleed(tmp_path):
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :32] = (200, 100, 50, 255)
    pixels[:, 32:, 1] = 255  # hidden green
    picture = read_image(still(tmp_path / "a.png", pixels, "rgba"), 24, 24)
    assert picture.note == "transparent parts made black, 64x64 scaled to 24x24"
    assert np.abs(picture.frames[0, :, :11].astype(int) - (200, 100, 50)).max() <= 1
    assert (picture.frames[0, ..., 1] <= 100).all() and not picture.frames[0, :, 13:].any()
    pixels[..., :] = (200, 100, 50, 128)
    half = read_image(still(tmp_path / "b.png", pixels, "rgba"), 64, 64).frames[0]
    assert np.abs(half.astype(int) - (100, 50, 25)).max() <= 1
    pixels[..., 3] = 255
    assert not read_image(still(tmp_path / "c.png", pixels, "rgba"), 64, 64).note


def test_a_palette_is_looked_up(tmp_path):
    places = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 2
    table = np.zeros((256, 4), np.uint8)  # A, R, G, B
    table[0], table[1] = (255, 250, 10, 20), (255, 5, 100, 200)
    frame = av.VideoFrame.from_ndarray((places, table), format="pal8")
    coder = av.CodecContext.create("png", "w")
    coder.width = coder.height = 64
    coder.pix_fmt, coder.time_base = "pal8", Fraction(1, 25)
    (tmp_path / "a.png").write_bytes(bytes(coder.encode(frame)[0]))
    picture = read_image(tmp_path / "a.png", 64, 64)
    assert picture.note == ""
    np.testing.assert_array_equal(picture.frames[0], table[places][..., 1:])


UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_jpeg_is_turned_as_its_exif_says(tmp_path, orientation):
    path = jpeg(tmp_path / "a.jpg", CORNERS)
    tag = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00" + bytes([orientation]) + b"\x00\x00"
    exif = b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08\x00\x01" + tag + b"\x00\x00\x00\x00"
    content = path.read_bytes()
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    path.write_bytes(content[:2] + segment + content[2:])
    expected = UPRIGHT[orientation](CORNERS).astype(int)
    height, width, _ = expected.shape
    picture = read_image(path, height, width)
    assert picture.note == ("turned upright" if orientation > 1 else "")
    middles = np.ix_([height // 4, -height // 4], [width // 4, -width // 4])
    assert np.abs(picture.frames[0][middles] - expected[middles]).max() <= 4


def test_a_clip_is_turned_as_its_display_matrix_says(tmp_path):
    path = film(tmp_path / "a.mp4", [CORNERS] * 3)
    content = path.read_bytes()
    place = content.index(IDENTITY, content.index(b"tkhd"))
    path.write_bytes(content[:place] + TURNED + content[place + len(TURNED) :])
    clip = read_clip(path, 48, 48, 30)
    assert clip.note == "turned upright, 32x48 scaled to 48x72, 24 rows cropped"
    assert np.abs(clip.frames[0, 6, 6].astype(int) - (0, 0, 255)).max() <= 4
    assert np.abs(clip.frames[0, 6, -6].astype(int) - (255, 0, 0)).max() <= 4


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    path = film(tmp_path / "a.mp4", [chart(96, 96)] * 2, pixel=Fraction(2))
    assert read_clip(path, 48, 96, 30).note == "96x96 scaled to 96x48"


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".ts", ".h264"])
def test_a_clip_is_read_at_the_rate_asked_for(tmp_path, suffix):
    path = film(tmp_path / f"a{suffix}", counted(30))
    clip = read_clip(path, 64, 64, 16)
    assert numbers(clip) == [int(n / 16 * 30 + 1e-6) for n in range(16)]
    if suffix != ".h264":  # where no rate is written
        assert clip.note == "30 FPS read at 16 FPS"
    assert numbers(read_clip(path, 64, 64, 60)) == [n // 2 for n in range(60)]


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_our_own_videos_come_back_frame_by_frame(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with VideoWriter(path, 16) as writer:
        writer.write(np.stack(counted(33)))
    clip = read_clip(path, 64, 64, 16)
    assert numbers(clip) == list(range(33))
    assert clip.note == ""


def test_frames_are_shown_as_long_as_their_times_say(tmp_path):
    path = film(tmp_path / "a.mkv", counted(4), times=[0, 250, 1000, 1125])
    assert numbers(read_clip(path, 64, 64, 16))[:18] == [0] * 4 + [1] * 12 + [2] * 2
    assert set(numbers(read_clip(path, 64, 64, 16))[18:]) == {3}
    late = film(tmp_path / "b.mkv", counted(4), times=[5000, 5250, 6000, 6125])
    assert numbers(read_clip(late, 64, 64, 16))[:18] == [0] * 4 + [1] * 12 + [2] * 2


def test_reading_stops_where_it_is_told_to(tmp_path):
    path = film(tmp_path / "a.mp4", counted(30))
    assert numbers(read_clip(path, 64, 64, 16, frames=5)) == [0, 1, 3, 5, 7]
    assert len(read_clip(path, 64, 64, 16, frames=99).frames) == 16
    assert len(read_clip(np.stack(counted(9)), 64, 64, 16, frames=5).frames) == 5


def test_an_array_is_a_clip_at_the_rate_asked_for():
    clip = read_clip(np.stack(counted(9, (64, 80))), 64, 64, 16)
    assert clip.frames.shape == (9, 64, 64, 3)
    assert clip.note == "16 columns cropped"
    assert numbers(clip) == list(range(9))


def test_one_frame_stays_one(tmp_path):
    clip = read_clip(still(tmp_path / "a.png", chart()), 64, 192, 16)
    np.testing.assert_array_equal(clip.frames, chart()[None])
    assert clip.note == ""
    alone = film(tmp_path / "a.mp4", counted(1), fps=1)
    assert len(read_clip(alone, 64, 64, 16).frames) == 1


@pytest.mark.parametrize("name", ["a:b.png", "%03d.png", "http:x.png", "ä ö.png"])
def test_a_name_is_only_a_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    still(tmp_path / name, CORNERS)
    np.testing.assert_array_equal(read_image(name, 32, 48).frames[0], CORNERS)


def test_what_follows_the_picture_of_a_jpeg_is_no_second_one(tmp_path):
    path = jpeg(tmp_path / "a.jpg", chart())
    path.write_bytes(2 * path.read_bytes())
    assert far_off(read_image(path, 64, 192).frames[0]) <= 2


@pytest.mark.parametrize("read", [read_image, read_clip])
def test_files_without_a_picture_are_refused(tmp_path, read):
    refused(read, tmp_path / "a.png", "no such file")
    refused(read, tmp_path, "is a directory")
    for name, content in (
        ("text.png", b"This is no picture.\n" * 30),
        ("page.jpg", b"<!DOCTYPE html><html></html>"),
        ("empty.mp4", b""),
        ("noise.webp", np.random.default_rng(0).bytes(5000)),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(read, tmp_path / name)
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound) + stream.encode(None))
    refused(read, tmp_path / "a.wav", "holds no")


def test_the_cover_of_a_song_is_no_video(tmp_path):
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 64
        cover.pix_fmt, cover.disposition = "yuvj420p", av.stream.Disposition.attached_pic.value
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        samples.sample_rate = 8000
        container.mux(sound.encode(samples) + sound.encode(None))
        frame = av.VideoFrame.from_ndarray(chart(64, 66)[:, :64], format="rgb24")
        container.mux(cover.encode(frame.reformat(format="yuvj420p")) + cover.encode(None))
    with av.open(str(path)) as container:
        if not container.streams.video[0].disposition & av.stream.Disposition.attached_pic:
            pytest.skip("this container keeps no cover")
    refused(read_clip, path, "holds no video")


@pytest.mark.parametrize("codec", ["gif", "apng"])
def test_an_animation_is_no_picture(tmp_path, codec):
    pix_fmt = {"gif": "rgb8", "apng": "rgb24"}[codec]
    path = film(
        tmp_path / f"a.{codec}", [chart(), chart()[:, ::-1]], 10, codec=codec, pix_fmt=pix_fmt
    )
    refused(read_image, path, "more than one picture")
    assert len(read_clip(path, 64, 192, 10).frames) == 2
    refused(read_image, film(tmp_path / "a.mp4", counted(3)), "more than one picture")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff"])
def test_half_a_picture_is_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    path = tmp_path / f"a{suffix}"
    if suffix == ".webp":
        still(path, noise, pix_fmt="yuv420p")
    else:
        (jpeg if suffix == ".jpg" else still)(path, noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(read_image, path, "damaged")


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".ts"])
def test_half_a_clip_is_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
    codec = "mpeg4" if suffix == ".avi" else "libx264"
    path = film(tmp_path / f"a{suffix}", list(noise), codec=codec)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    refused(read_clip, path, "damaged")


def test_heic_is_refused_since_its_tiles_are_streams(tmp_path):
    path = film(tmp_path / "a.mp4", counted(1))
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"heic" + content[12:])
    refused(read_image, path, "HEIC")


def test_a_file_without_permission_is_refused(tmp_path):
    path = still(tmp_path / "a.png", CORNERS)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    refused(read_image, path, "permission denied")


@pytest.mark.parametrize(
    ("read", "array"),
    [
        (read_image, np.zeros((8, 8, 3), np.float32)),
        (read_image, np.zeros((8, 8), np.uint8)),
        (read_image, np.zeros((8, 8, 4), np.uint8)),
        (read_image, np.zeros((1, 8, 8, 3), np.uint8)),
        (read_image, np.zeros((0, 8, 3), np.uint8)),
        (read_clip, np.zeros((8, 8, 3), np.uint8)),
        (read_clip, np.zeros((0, 8, 8, 3), np.uint8)),
        (read_clip, np.zeros((2, 8, 8, 3), np.int64)),
    ],
)
def test_arrays_of_another_kind_are_refused(read, array):
    refused(read, array, str(list(array.shape)))


def test_a_line_is_refused(tmp_path):
    path = still(tmp_path / "a.png", np.zeros((1, 2000, 3), np.uint8))
    refused(read_image, path, "2000x1", "32x32")


def test_paths_may_be_strings(tmp_path):
    path = still(tmp_path / "a.png", CORNERS)
    assert isinstance(path, pathlib.Path)
    np.testing.assert_array_equal(read_image(str(path), 32, 48).frames[0], CORNERS)
