"""Video files: what is written can be read, and nothing unplayable gets a final name."""

import errno
import os
import signal

import av
import numpy as np
import pytest

from longlive_jax.errors import InputError
from longlive_jax.video import VideoWriter


def read(path):
    """The frames of a video: uint8 [t, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def solid(colour, frames, size=64):
    return np.full((frames, size, size, 3), colour, np.uint8)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_frames_come_back_with_their_colours(tmp_path, suffix):
    path = tmp_path / f"video{suffix}"
    parts = [solid((200, 30, 40), 9), solid((20, 60, 220), 12), solid((250, 160, 10), 3)]
    with VideoWriter(path, fps=16) as writer:
        for part in parts:
            writer.write(part)
    assert writer.complete
    frames = read(path)
    assert frames.shape == (24, 64, 64, 3)
    assert np.abs(frames.astype(int) - np.concatenate(parts)).max() <= 4
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 16
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
    assert os.listdir(tmp_path) == [path.name]


def test_the_name_appears_only_at_the_end(tmp_path):
    path = tmp_path / "video.mp4"
    with VideoWriter(path, fps=16) as writer:
        writer.write(solid(90, 9))
        assert not path.exists()
    assert len(read(path)) == 9


def test_an_interrupted_video_is_playable(tmp_path):
    path = tmp_path / "video.mp4"
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, fps=16) as writer:
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


def test_without_frames_nothing_is_left(tmp_path):
    with VideoWriter(tmp_path / "video.mp4", fps=16) as writer:
        pass
    assert not writer.complete
    assert not os.listdir(tmp_path)


def test_no_space_leaves_nothing_and_keeps_the_older_video(tmp_path, monkeypatch):
    path = tmp_path / "video.mp4"
    with VideoWriter(path, fps=16) as writer:
        writer.write(solid(90, 9))

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        pytest.raises(InputError, match="no space left on device"),
        VideoWriter(path, 16) as writer,
    ):
        writer.write(solid(120, 9))
        monkeypatch.setattr("longlive_jax.video._picture", full)
        writer.write(solid(120, 12))
    assert not writer.complete
    assert os.listdir(tmp_path) == [path.name]
    assert len(read(path)) == 9


def test_odd_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="even"), VideoWriter(tmp_path / "video.mp4", 16) as writer:
        writer.write(np.zeros((3, 63, 64, 3), np.uint8))
    assert not os.listdir(tmp_path)
