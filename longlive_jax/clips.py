"""Frames of video files: when each is shown, and any of them by their numbers.

This is the one reader of clips: sessions, `longlive data check` and training use it. A file is
first gone through without decoding, which tells its frames and their times; then the frames that
are needed are decoded, from the key frame before them on where the file can be searched.

Containers differ in what their time stamps say. AVI and ASF number frames in the order in which
they are coded, so that with B-frames only the order of the decoder tells which is which. Clocks
restart where transport streams were joined, where reading goes on at once, and jump where a
recording was interrupted.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from jaxtyping import Float, Int, UInt8

from longlive_jax import demux, filters, interrupts
from longlive_jax.errors import InputError
from longlive_jax.fit import Fitter

Path = str | os.PathLike[str]

REMEMBERED = 1024  # files whose frames' times are kept: 16 bytes a frame
ROUNDING = 1e-3  # s: to which Matroska rounds the times of frames
LONGEST = 10.0  # s that a frame is shown at most: recordings that were interrupted have long gaps
FASTEST = 240  # FPS that are believed where frames have no times
DEFAULT_RATE = Fraction(25)  # of a file that says nothing, as FFmpeg has it
NEAR = 0.02  # between rates that are the same
# Formats with an index. In others FFmpeg searches, and now and then gives frames wrong times then.
SEARCHABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi")
LOST = 16  # frames at a start that need what came before it; H.264 reorders no more
BRANDS = ("major_brand", "compatible_brands")  # of an MP4 or a relative of it
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # decoders that read it, where FFmpeg's do not
NONE = -(1 << 63)  # stands for a time stamp that is missing


@dataclasses.dataclass(frozen=True)
class Footage:
    """Frames of a video file, with the times at which they are shown.

    times: When its frames are shown, in seconds from the first one on.
    end: When the last one is no longer shown.
    stamps: Their time stamps in units of the file, rising in each part of it; None where they do
      not tell frames apart.
    parts: Where its clock restarts: the first frame of each part.
    notes: What is unusual about its time stamps, and what was done.
    """

    height: int
    width: int
    fps: Fraction
    times: Float[np.ndarray, " t"]
    end: float
    stamps: Int[np.ndarray, " t"] | None
    parts: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        return float(len(self.times) / self.fps)

    def shown_at(self, fps: int) -> Int[np.ndarray, " n"]:
        """Return the number of the frame that is shown at each of the instants n/fps."""
        if len(self.times) == 1:
            return np.zeros(1, np.int64)
        due = np.ceil((np.append(self.times, self.end) - ROUNDING) * fps - 1e-6).astype(np.int64)
        due = np.maximum.accumulate(np.maximum(due, 0))
        due[-1] = max(due[-1], 1)
        return np.repeat(np.arange(len(self.times)), np.diff(due))


@contextlib.contextmanager
def open_video(path: Path, what: str) -> Iterator[tuple[Any, Any]]:
    """Open a file and choose its video stream.

    Args:
      path: The file.
      what: "picture" or "video", for what is said of it.
    """
    with contextlib.ExitStack() as stack:
        container = stack.enter_context(demux.opened(path, what))
        if _splits_wrongly(container):
            container = stack.enter_context(demux.opened(path, what, fflags="noparse"))
        brands = "".join(container.metadata.get(name, "") for name in BRANDS)
        if "heic" in brands or "heix" in brands:
            # These are cut into tiles, each of which is a stream.
            raise InputError(f"{path} is a HEIC picture: save it as JPEG or PNG")
        found = []
        for stream in container.streams.video:
            cover = stream.disposition & Disposition.attached_pic  # of a song
            if stream.codec_context is not None and not cover:
                found.append(stream)
        if not found:
            raise InputError(f"{path} holds no {what}")
        stream = found[0]
        if "avis" in brands and what == "video":  # its first stream is a picture of it
            stream = max(found, key=lambda one: one.frames)
        for one in (stream, _alpha_of(container, stream)):
            if one is not None:
                _check_size(path, one.codec_context)
                # Not of frames: such threads now and then lose that a frame is damaged.
                one.thread_type = "SLICE"
        yield container, stream


def _splits_wrongly(container: Any) -> bool:
    """Return whether FFmpeg would look for start codes in frames of an ASF that have none."""
    if container.format.name != "asf" or not container.streams.video:
        return False
    coded = container.streams.video[0].codec_context
    return coded is not None and (coded.extradata or b"")[:1] == b"\1"  # as MP4 has it


def _check_size(path: object, coded: Any) -> None:
    """Raise InputError for too many pixels: few bytes can claim to be any number of them."""
    if coded.width * coded.height > demux.MOST_PIXELS:
        raise InputError(
            f"{path} is {coded.width}x{coded.height}, more than"
            f" {demux.MOST_PIXELS / 1e6:.0f} megapixels, the most that is read"
        )
    coded.options = demux.LIMITS  # sizes may change within a file


def _alpha_of(container: Any, stream: Any) -> Any:
    """Return the stream that holds the alpha of an AVIF, if it has one."""
    brands = "".join(container.metadata.get(name, "") for name in BRANDS)
    after = [one for one in container.streams.video if one.index == stream.index + 1]
    if "avi" not in brands or not after or after[0].codec_context is None:
        return None
    alpha, size = after[0], (stream.codec_context.width, stream.codec_context.height)
    grey = (alpha.codec_context.pix_fmt or "").startswith("gray")
    fits = (alpha.codec_context.width, alpha.codec_context.height) == size
    return alpha if grey and fits and alpha.frames == stream.frames else None


def decode(container: Any, stream: Any) -> Iterator[av.VideoFrame]:
    """Return the frames of a stream in the order of the decoder, with their alpha."""
    alpha = _alpha_of(container, stream)
    if alpha is not None:
        return _with_alpha(container, stream, alpha)
    tags = {name.lower(): value for name, value in stream.metadata.items()}
    name = WITH_ALPHA.get(stream.codec_context.name)
    if tags.get("alpha_mode") == "1" and name is not None:
        return _decoded_by(name, container, stream)
    return container.decode(stream)


def _with_alpha(container: Any, stream: Any, alpha: Any) -> Iterator[av.VideoFrame]:
    colours: list[av.VideoFrame] = []
    alphas: list[av.VideoFrame] = []
    for packet in container.demux(stream, alpha):
        (alphas if packet.stream is alpha else colours).extend(packet.decode())
        while colours and alphas:
            yield filters.merge_alpha(colours.pop(0), alphas.pop(0))


def _decoded_by(name: str, container: Any, stream: Any) -> Iterator[av.VideoFrame]:
    try:
        coder = av.CodecContext.create(name, "r")
    except ValueError as error:
        raise InputError(f"reading the transparency of a clip needs FFmpeg with {name}") from error
    coder.options = demux.LIMITS
    coder.thread_type = "SLICE"
    for packet in container.demux(stream):
        yield from coder.decode(packet if packet.size else None)


def footage(path: Path) -> Footage:
    """Find the frames of a video file and their times, without decoding them.

    Raises:
      InputError: the file cannot be read, is damaged or cut short, or holds no video.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        reason = str(error.strerror or error).lower()
        raise InputError(f"cannot read {path}: {reason}") from error
    return _footage(pathlib.Path(path), stat.st_size, stat.st_mtime_ns)


@dataclasses.dataclass
class _Packets:
    """Time stamps of the packets that hold a frame each, in the order of the file."""

    pts: array.array
    dts: array.array
    keys: array.array
    total: int = 0  # those that hold none are counted, too
    duration: int = 0  # of the last one


@functools.lru_cache(REMEMBERED)
def _footage(path: pathlib.Path, size: int, changed: int) -> Footage:
    del size, changed  # they are there to tell files apart
    with open_video(path, "video") as (container, stream):
        packets = _scan(container, stream)
        if stream.frames > packets.total:
            raise InputError(
                f"{path} is damaged, it is cut short: {packets.total} of its {stream.frames} frames"
                " are there"
            )
        if not packets.pts:
            raise InputError(f"{path} holds no video")
        average, guessed = _fraction(stream.average_rate), _fraction(stream.guessed_rate)
        if average and guessed and abs(average / guessed - 1) < NEAR:
            average = guessed  # the other one is rounded with the times of frames
        coded = stream.codec_context
        steady = [rate for rate in (guessed, average) if rate and rate <= FASTEST]
        clock = _Clock(
            Fraction(stream.time_base), average or guessed, steady[0] if steady else None
        )
        return clock.footage(packets, bool(coded.has_b_frames), coded.height, coded.width)


def _fraction(rate: Any) -> Fraction | None:
    """Return a rate of PyAV, which has a type of its own from version 19 on."""
    return Fraction(rate.numerator, rate.denominator) if rate else None


def _scan(container: Any, stream: Any) -> _Packets:
    packets = _Packets(array.array("q"), array.array("q"), array.array("b"))
    vp8 = stream.codec_context.name == "vp8"
    for packet in container.demux(stream):
        interrupts.stop.check()
        pts, dts = packet.pts, packet.dts
        if not packet.size and pts is None and dts is None:
            continue  # the end
        packets.total += 1
        # VP8 has frames of their own that are only referred to.
        hidden = vp8 and packet.size and not memoryview(packet)[0] & 0x10
        if not packet.size or packet.is_discard or hidden:
            continue
        packets.pts.append(NONE if pts is None else pts)
        packets.dts.append(NONE if dts is None else dts)
        packets.keys.append(packet.is_keyframe)
        packets.duration = packet.duration or 0
    return packets


@dataclasses.dataclass(frozen=True)
class _Clock:
    """Makes times of the time stamps of a file."""

    unit: Fraction
    rate: Fraction | None
    steady: Fraction | None  # of frames that have no times

    def footage(self, packets: _Packets, reorders: bool, height: int, width: int) -> Footage:
        pts, dts = np.array(packets.pts, np.int64), np.array(packets.dts, np.int64)
        pieces = _pieces(pts, dts, np.array(packets.keys, bool))
        if pieces is None or (pts == NONE).any():
            notes = () if pieces is not None else (self._disorder,)
            return self._steady(len(pts), height, width, notes)
        count = sum(len(piece) for piece in pieces)
        in_order = all((np.diff(piece) >= 0).all() for piece in pieces)
        different = sum(len(np.unique(piece)) for piece in pieces)
        if different < 0.75 * count or (not in_order and not reorders):
            return self._steady(count, height, width, (self._disorder,))
        stamps = [np.sort(piece) for piece in pieces]
        times, end, notes = self._times(stamps, packets.duration)
        rate = self.steady if notes else self.rate  # an average would count the gaps
        rate = rate or Fraction(count / end).limit_denominator(1001)
        parts = tuple(itertools.accumulate((len(piece) for piece in stamps[:-1]), initial=0))
        # Stamps that only rise are those of coding, where frames are shown in another order.
        told = None if in_order and reorders else np.concatenate(stamps)
        if told is None and len(parts) == 1 and _even(times):
            return self._steady(count, height, width, notes)
        return Footage(height, width, rate, times, end, told, parts, notes)

    @property
    def _disorder(self) -> str:
        rate = float(self.steady or DEFAULT_RATE)
        return f"its time stamps are in disorder: its frames follow each other at {rate:.4g} FPS"

    def _steady(self, count: int, height: int, width: int, notes: tuple[str, ...]) -> Footage:
        rate = Fraction(self.steady or DEFAULT_RATE)
        times = np.arange(count) / float(rate)
        return Footage(height, width, rate, times, count / float(rate), None, (0,), notes)

    def _times(
        self, stamps: Sequence[Int[np.ndarray, " t"]], duration: int
    ) -> tuple[Float[np.ndarray, " n"], float, tuple[str, ...]]:
        """Return the times of frames and the end, with long gaps shortened; and notes of that."""
        unit, times, notes, start = float(self.unit), [], [], 0.0
        steps = np.concatenate([np.diff(piece) * unit for piece in stamps])
        usual = steps[(steps > 0) & (steps <= LONGEST)]
        step = float(np.median(usual)) if len(usual) else float(1 / (self.steady or DEFAULT_RATE))
        step = min(step, LONGEST)
        for piece in stamps:
            if times:
                notes.append(f"its clock restarts after {span(start)}: read on")
            lasts = np.diff(piece) * unit
            jumps = lasts > LONGEST
            lasts[jumps] = LONGEST
            here = start + np.concatenate([[0.0], np.cumsum(lasts)])
            for place in np.flatnonzero(jumps):
                gap = (piece[place + 1] - piece[place]) * unit
                notes.append(
                    f"a gap of {span(gap)} after {span(here[place])} is shortened to {LONGEST:g} s"
                )
            times.append(here)
            start = float(here[-1]) + step
        last = float(duration * self.unit) or (steps[-1] if len(steps) else step)
        end = float(times[-1][-1]) + (last if 0 < last <= LONGEST else step)
        more = len(notes) - 1
        notes = [f"{notes[0]} (and {more} more)" if more > 0 else note for note in notes[:1]]
        return np.concatenate(times), end, tuple(notes)


def _even(times: Float[np.ndarray, " t"]) -> bool:
    """Return whether all frames are shown equally long, as far as times are rounded, but for the
    first ones: some containers have the delay of reordering there.
    """
    steps = np.diff(times)
    return not len(steps) or bool((np.abs(steps - np.median(steps)) < 2 * ROUNDING)[3:].all())


def span(seconds: float) -> str:
    """Return a time as people write it: "1.5 s", "2:05" or "1:02:05"."""
    if seconds < 100:
        return f"{seconds:.4g} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _pieces(
    pts: Int[np.ndarray, " n"], dts: Int[np.ndarray, " n"], keys: np.ndarray
) -> list[Int[np.ndarray, " t"]] | None:
    """Return presentation times between the places where the clock of decoding falls back, without
    what comes before the first key frame; None where it falls back all the time.
    """
    both = (dts[1:] != NONE) & (dts[:-1] != NONE)
    breaks = np.flatnonzero(both & (dts[1:] < dts[:-1])) + 1
    if len(breaks) > len(pts) // 8:
        return None
    pieces = []
    for begin, end in itertools.pairwise([0, *breaks.tolist(), len(pts)]):
        first = np.flatnonzero(keys[begin:end])
        pieces.append(pts[begin + (int(first[0]) if len(first) else 0) : end])
    return pieces


def read(
    path: Path, indices: Sequence[int], height: int, width: int
) -> tuple[UInt8[np.ndarray, "t height width 3"], tuple[str, ...]]:
    """Read frames of a file by their numbers, which never fall; return them fitted, with notes.

    Only what lies between the key frame before the first of them and the last is decoded, where the
    file can be searched; one frame of it at a time is held.

    Raises:
      InputError: the file cannot be read, is damaged, or lacks one of the frames.
    """
    shot = footage(path)
    if not 0 <= indices[0] <= indices[-1] < len(shot.times):
        raise InputError(f"{path} has {len(shot.times)} frames, not frame {indices[-1]}")
    frames = np.empty((len(indices), height, width, 3), np.uint8)
    notes: dict[str, None] = {}
    done = 0
    with open_video(path, "video") as (container, stream):
        pixel = Fraction(stream.sample_aspect_ratio or 1)
        fit = Fitter(str(path), height, width, pixel)
        numbered = _numbered(container, stream, shot, max(0, int(indices[0]) - 1))
        for number, frame, fields in filters.deinterlace(numbered):
            interrupts.stop.check()
            if number < indices[done]:
                continue
            if number > indices[done] or frame.is_corrupt:
                raise InputError(f"{path} is damaged at frame {indices[done]}")
            pixels, said = fit(frame)
            notes |= dict.fromkeys((*(("deinterlaced",) if fields else ()), *said))
            while done < len(indices) and indices[done] == number:
                frames[done] = pixels
                done += 1
            if done == len(indices):
                return frames, tuple(notes)
    raise InputError(f"{path} is damaged at frame {indices[done]}")


def _numbered(
    container: Any, stream: Any, shot: Footage, first: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames and their numbers in the order in which they are shown, from one at or before `first`.

    Frames that belong to no number are left out. Those that a part begins with and that cannot be
    decoded, since they refer to what came before it, are replaced by the first one that can.
    """
    if shot.stamps is None:
        yield from enumerate(decode(container, stream))
        return
    searchable = len(shot.parts) == 1 and container.format.name in SEARCHABLE
    decoded, expected = _sought(container, stream, shot.stamps, first if searchable else 0)
    for frame in decoded:
        number = _number(shot, frame.pts, expected)
        if number is None:
            continue
        if expected in shot.parts and number - expected <= LOST:
            for missing in range(expected, number):
                yield missing, frame
        yield number, frame
        expected = number + 1


def _number(shot: Footage, stamp: int | None, expected: int | None) -> int | None:
    """Return the number of the frame of that time stamp: the first from the expected one on."""
    assert shot.stamps is not None
    least = expected or 0
    if stamp is None:
        return least
    for begin, end in itertools.pairwise((*shot.parts, len(shot.stamps))):
        number = max(least, begin + int(np.searchsorted(shot.stamps[begin:end], stamp)))
        if number < end and shot.stamps[number] == stamp:
            return number
    return None


def _sought(
    container: Any, stream: Any, stamps: Int[np.ndarray, " t"], first: int
) -> tuple[Iterator[av.VideoFrame], int | None]:
    """Frames from one at or before `first` on, and the number to expect of it where it is known."""
    # A key frame may be decoded before the instant sought and shown after it.
    for origin in (stamps[first], stamps[0]) if first else ():
        container.seek(int(origin), stream=stream)
        decoded = decode(container, stream)
        opening = next(decoded, None)
        if opening is not None and opening.pts is not None and opening.pts <= stamps[first]:
            return itertools.chain([opening], decoded), None
    if first:
        container.seek(int(stamps[0]), stream=stream)
    return decode(container, stream), 0
