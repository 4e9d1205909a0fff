"""Writing a video while it is being made.

Frames are encoded as they come into a file beside the final one; the final name appears only when
that file is complete, and so playable.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import threading
from collections.abc import Iterator

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from jaxtyping import UInt8

from longlive_jax import output


class VideoWriter:
    """Encodes frames to H.264 (`yuv420p`, which every player shows) as they come.

    Used as a context. Leaving it completes the file and gives it its name, also when an exception
    such as `KeyboardInterrupt` ends the context: what was written until then is a playable video.
    Only a failure of the writing itself, or no frame at all, leaves nothing behind. Ctrl-C waits
    for a `write` in progress, since half a chunk cannot be taken back out of an encoder.

    Args:
      path: Ends in .mp4, .mov or .mkv; a file of that name is replaced.
      fps: Frames per second.
      crf: Quality, x264's scale: smaller is better, 18 looks lossless.

    Raises:
      InputError: the file cannot be written (folder, permission, no space), at any time.
    """

    def __init__(self, path: pathlib.Path, fps: int, crf: int = 16):
        output.check_video(path)
        self.path = path
        self.frames = 0
        self.complete = False  # the file has its name
        self._part = output.part(path)
        self._failed = False
        with output.writing(path):
            self._container = av.open(
                str(self._part), "w", format=output.FORMATS[path.suffix.lower()]
            )
        self._stream = self._container.add_stream("libx264", rate=fps)
        self._stream.options = {"crf": str(crf), "preset": "veryfast"}

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, frames: UInt8[np.ndarray, "t H W 3"]) -> None:
        """Appends frames; height and width are even, and those of the first call."""
        with _uninterrupted(), self._guarded():
            if not self.frames:
                self._open(*frames.shape[1:3])
            for frame in frames:
                self._container.mux(self._stream.encode(_picture(frame)))
                self.frames += 1

    def close(self) -> None:
        """Completes and names the file; removes it if it has no frames or writing has failed."""
        with _uninterrupted():
            try:
                if self.frames and not self._failed:
                    with self._guarded():
                        self._container.mux(self._stream.encode(None))
                        self._container.close()
                        os.replace(self._part, self.path)
                    self.complete = True
            finally:
                with contextlib.suppress(OSError, av.FFmpegError):
                    self._container.close()
                self._part.unlink(missing_ok=True)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, height: int, width: int) -> None:
        if height % 2 or width % 2:
            raise ValueError(f"yuv420p needs an even height and width, not {height}x{width}")
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = "yuv420p"
        # Untagged, players guess the matrix from the height, and colours differ between them.
        context = self._stream.codec_context
        context.colorspace = int(Colorspace.ITU709)
        context.color_range = int(ColorRange.MPEG)
        context.color_primaries = int(ColorPrimaries.BT709)
        context.color_trc = int(ColorTrc.BT709)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            with output.writing(self.path):
                yield
        except BaseException:
            self._failed = True
            raise


def _picture(frame: UInt8[np.ndarray, "H W 3"]) -> av.VideoFrame:
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    return rgb.reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
    )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the end of the block. Signals only reach the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = []
    previous = signal.signal(signal.SIGINT, lambda *_: held.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            signal.raise_signal(signal.SIGINT)
