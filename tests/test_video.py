"""Video files: what is written can be read, and nothing unplayable gets a final name."""

import errno
import os
import signal
import threading

import av
import numpy as np
import pytest

from longlive_jax import video
from longlive_jax.errors import InputError
from longlive_jax.video import BackgroundWriter, VideoWriter

BOTH = pytest.mark.parametrize("Writer", [VideoWriter, BackgroundWriter])


def read(path):
    """The frames of a video: uint8 [t, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def solid(colour, frames, size=64):
    return np.full((frames, size, size, 3), colour, np.uint8)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert "video" not in [thread.name for thread in threading.enumerate()]


@BOTH
@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_frames_come_back_with_their_colours(tmp_path, suffix, Writer):
    path = tmp_path / f"video{suffix}"
    parts = [solid((200, 30, 40), 9), solid((20, 60, 220), 12), solid((250, 160, 10), 3)]
    with Writer(path, fps=16) as writer:
        for part in parts:
            writer.write(part)
    assert writer.complete and writer.frames == 24 and writer.path == path
    frames = read(path)
    assert frames.shape == (24, 64, 64, 3)
    assert np.abs(frames.astype(int) - np.concatenate(parts)).max() <= 4
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 16
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
    assert os.listdir(tmp_path) == [path.name]


@BOTH
def test_the_name_appears_only_at_the_end(tmp_path, Writer):
    path = tmp_path / "video.mp4"
    with Writer(path, fps=16) as writer:
        writer.write(solid(90, 9))
        assert not path.exists()
    assert len(read(path)) == 9


@BOTH
def test_an_interrupted_video_is_playable(tmp_path, Writer):
    path = tmp_path / "video.mp4"
    with pytest.raises(KeyboardInterrupt), Writer(path, fps=16) as writer:
        writer.write(solid(90, 9))
        writer.write(solid(120, 12))
        raise KeyboardInterrupt
    assert len(read(path)) == 21
    assert os.listdir(tmp_path) == [path.name]


def test_ctrl_c_waits_for_the_chunk_being_written(tmp_path, monkeypatch):
    path = tmp_path / "video.mp4"
    picture = av.VideoFrame.from_ndarray
    seen = []

    def press(*args, **options):
        seen.append(None)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return picture(*args, **options)

    monkeypatch.setattr(
        "longlive_jax.video.av.VideoFrame", type("Frame", (), {"from_ndarray": press})
    )
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, fps=16) as writer:
        writer.write(solid(90, 12))
        pytest.fail("the interrupt was lost")
    assert len(read(path)) == 12


@BOTH
def test_without_frames_nothing_is_left(tmp_path, Writer):
    with Writer(tmp_path / "video.mp4", fps=16) as writer:
        pass
    assert not writer.complete
    assert not os.listdir(tmp_path)


@BOTH
def test_no_space_leaves_nothing_and_keeps_the_older_video(tmp_path, monkeypatch, Writer):
    path = tmp_path / "video.mp4"
    with VideoWriter(path, fps=16) as writer:
        writer.write(solid(90, 9))

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        pytest.raises(InputError, match="no space left on device"),
        Writer(path, 16) as writer,
    ):
        writer.write(solid(120, 9))
        monkeypatch.setattr("longlive_jax.video._picture", full)
        writer.write(solid(120, 12))
    assert not writer.complete
    assert os.listdir(tmp_path) == [path.name]
    assert len(read(path)) == 9


@BOTH
def test_odd_sizes_are_refused(tmp_path, Writer):
    with pytest.raises(ValueError, match="even"), Writer(tmp_path / "video.mp4", 16) as writer:
        writer.write(np.zeros((3, 63, 64, 3), np.uint8))
    assert not os.listdir(tmp_path)


@BOTH
def test_a_failure_at_the_very_end_leaves_nothing(tmp_path, monkeypatch, Writer):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("longlive_jax.output.os.replace", full)
    with (
        pytest.raises(InputError, match="no space left on device"),
        Writer(tmp_path / "video.mp4", 16) as writer,
    ):
        writer.write(solid(120, 9))
    assert not writer.complete
    assert not os.listdir(tmp_path)


def test_the_thread_writes_the_same_video(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (33, 64, 64, 3), np.uint8)
    for Writer in (VideoWriter, BackgroundWriter):
        with Writer(tmp_path / f"{Writer.__name__}.mp4", 16) as writer:
            for part in np.split(noise, [9, 21]):
                writer.write(part)
    one, other = (read(tmp_path / name) for name in sorted(os.listdir(tmp_path)))
    np.testing.assert_array_equal(one, other)


@pytest.fixture
def gate(monkeypatch):
    """No frame is encoded until this event is set."""
    gate, picture = threading.Event(), video._picture

    def wait(frame):
        assert gate.wait(60)
        return picture(frame)

    monkeypatch.setattr("longlive_jax.video._picture", wait)
    yield gate
    gate.set()


def test_a_write_waits_while_the_queue_is_full(tmp_path, gate):
    path = tmp_path / "video.mp4"
    with BackgroundWriter(path, 16, depth=2) as writer:
        for _ in range(3):  # one is being encoded, two wait
            writer.write(solid(90, 4))
        fourth = threading.Thread(target=writer.write, args=(solid(90, 4),))
        fourth.start()
        fourth.join(0.1)
        assert fourth.is_alive() and writer.frames == 0
        gate.set()
        fourth.join(60)
        assert not fourth.is_alive()
    assert writer.frames == len(read(path)) == 16


def test_a_failure_of_the_thread_is_raised_by_a_later_write(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("longlive_jax.video._picture", full)
    with (
        pytest.raises(InputError, match="no space left on device"),
        BackgroundWriter(tmp_path / "video.mp4", 16, depth=1) as writer,
    ):
        for _ in range(3):  # the third has room only after the first has failed
            writer.write(solid(90, 9))
        pytest.fail("the failure was lost")
    assert not writer.complete
    assert not os.listdir(tmp_path)


def test_a_failure_of_the_thread_is_raised_when_nothing_more_is_written(tmp_path, gate):
    with (
        pytest.raises(ValueError, match="even"),
        BackgroundWriter(tmp_path / "video.mp4", 16) as writer,
    ):
        writer.write(np.zeros((3, 63, 64, 3), np.uint8))
    assert not os.listdir(tmp_path)


def test_ctrl_c_while_the_thread_encodes_loses_nothing(tmp_path, monkeypatch):
    path, picture, seen = tmp_path / "video.mp4", video._picture, []

    def press(frame):
        seen.append(None)
        if len(seen) == 5:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return picture(frame)

    monkeypatch.setattr("longlive_jax.video._picture", press)
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(path, 16) as writer:
        writer.write(solid(90, 12))
        threading.Event().wait(60)
        pytest.fail("the interrupt was lost")
    assert len(read(path)) == 12


def test_ctrl_c_while_a_write_waits_comes_after_it(tmp_path, monkeypatch, gate):
    path = tmp_path / "video.mp4"
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(path, 16, depth=1) as writer:
        writer.write(solid(90, 4))
        writer.write(solid(90, 4))
        put = writer._waiting.put

        def press(frames):
            os.kill(os.getpid(), signal.SIGINT)
            threading.Timer(0.1, gate.set).start()
            put(frames)

        with monkeypatch.context() as patch:
            patch.setattr(writer._waiting, "put", press)
            writer.write(solid(90, 4))
        pytest.fail("the interrupt was lost")
    assert len(read(path)) == 12


def test_ctrl_c_while_the_context_is_left_comes_after_it(tmp_path, monkeypatch, gate):
    path = tmp_path / "video.mp4"
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(path, 16) as writer:
        writer.write(solid(90, 4))
        put = writer._waiting.put

        def press(end):
            os.kill(os.getpid(), signal.SIGINT)
            threading.Timer(0.1, gate.set).start()
            put(end)

        monkeypatch.setattr(writer._waiting, "put", press)
    assert writer.complete and len(read(path)) == 4


def test_without_a_write_no_thread_starts(tmp_path):
    writer = BackgroundWriter(tmp_path / "video.mp4", 16)
    assert "video" not in [thread.name for thread in threading.enumerate()]
    writer.close()
    assert not os.listdir(tmp_path)
