"""Writing a video while it is being made.

Frames are encoded as they come into a file beside the final one; the final name appears only when
that file is complete, and so playable.
"""

from __future__ import annotations

import contextlib
import pathlib
import queue
import threading
from collections.abc import Iterator

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from jaxtyping import UInt8

from longlive_jax import interrupts, output


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
        self._failed = False
        with output.writing(path):
            self._part = output.Part(path)
            try:
                self._container = av.open(
                    str(self._part.path), "w", format=output.FORMATS[path.suffix.lower()]
                )
            except BaseException:
                self._part.discard()
                raise
        self._stream = self._container.add_stream("libx264", rate=fps)
        self._stream.options = {"crf": str(crf), "preset": "veryfast"}

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, frames: UInt8[np.ndarray, "t H W 3"]) -> None:
        """Appends frames; height and width are even, and those of the first call."""
        with interrupts.hold, self._guarded():
            if not self.frames:
                self._open(*frames.shape[1:3])
            for frame in frames:
                self._container.mux(self._stream.encode(_picture(frame)))
                self.frames += 1

    def close(self) -> None:
        """Completes and names the file; removes it if it has no frames or writing has failed."""
        with interrupts.hold:
            try:
                if self.frames and not self._failed:
                    with self._guarded():
                        self._container.mux(self._stream.encode(None))
                        self._container.close()
                        self._part.finish()
                    self.complete = True
            finally:
                with contextlib.suppress(OSError, av.FFmpegError):
                    self._container.close()
                self._part.discard()

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


class BackgroundWriter:
    """A `VideoWriter` whose encoding runs in a thread, while the next frames are being made.

    Used as a context in the same way. Up to `depth` calls' frames wait in memory, beside those
    being encoded; a `write` beyond that waits for room. What goes wrong in the thread is raised by
    the next `write`, or by leaving the context. Leaving it waits until all that was written is in
    the file and the thread has ended. Ctrl-C is held back meanwhile, and during a `write`: frames
    that a `write` was given are all in the file.

    Args:
      path: As for `VideoWriter`; so are `fps` and `crf`.
      depth: How many calls' frames may wait.

    Raises:
      InputError: the file cannot be written (folder, permission, no space), at any time.
    """

    def __init__(self, path: pathlib.Path, fps: int, crf: int = 16, depth: int = 2):
        self._writer = VideoWriter(path, fps, crf)
        self._waiting: queue.Queue[np.ndarray | None] = queue.Queue(depth)  # None is the end
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def path(self) -> pathlib.Path:
        return self._writer.path

    @property
    def frames(self) -> int:
        """How many are encoded by now; all of them once the context is left."""
        return self._writer.frames

    @property
    def complete(self) -> bool:
        return self._writer.complete

    def __enter__(self) -> BackgroundWriter:
        return self

    def write(self, frames: UInt8[np.ndarray, "t H W 3"]) -> None:
        """Hands frames over, as for `VideoWriter.write`; they must not be changed afterwards."""
        with interrupts.hold:
            # No earlier, where Ctrl-C could come between the start and the context that ends it.
            if self._thread is None:
                thread = threading.Thread(target=self._encode, name="video", daemon=True)
                thread.start()
                self._thread = thread
            self._waiting.put(frames)
        self._check()

    def close(self) -> None:
        """Waits for the thread, then does what `VideoWriter.close` does."""
        with interrupts.hold:
            if self._thread is not None:
                self._waiting.put(None)
                self._thread.join()
                self._thread = None
            self._writer.close()
        self._check()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self) -> None:
        while (frames := self._waiting.get()) is not None:
            # After a failure frames are taken and dropped, or a `write` would wait for ever.
            if self._failure is None:
                try:
                    self._writer.write(frames)
                except BaseException as error:  # noqa: BLE001  # `_check` raises it
                    self._failure = error

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure


def _picture(frame: UInt8[np.ndarray, "H W 3"]) -> av.VideoFrame:
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    return rgb.reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
    )
