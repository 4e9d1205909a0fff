"""Media files opened through FFmpeg: the file itself, and nothing that it refers to.

Playlists, lists of files, descriptions of network streams and patterns of numbered pictures make
FFmpeg open other files and sockets. Four things keep it from that, each enough alone for most
formats: such a file is recognised by its first bytes, the list of formats that are read holds none
that refers to others, nested opens are refused by a callback, and no protocol may be used.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

import av

from longlive_jax.errors import InputError

# Titles that are not UTF-8 are no reason to fail. PyAV 19 never fails on them, and has no option.
PYAV = int(av.__version__.split(".")[0])
LENIENT = {"metadata_errors": "replace"} if PYAV < 19 else {}

PICTURES = (
    "bmp dds dpx exr gem gif hdr j2k jpeg jpegls jpegxl jpegxs pam pbm pcx pfm pgm pgmyuv pgx"
)
PICTURES += " pgmyuv pgx phm png ppm psd qoi sgi sunrast tiff webp xbm xpm xwd"
# FFmpeg compares the whole name of a format, in which several stand for one demuxer.
CONTAINERS = (
    *("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg"),
    *("mpegvideo", "flv", "live_flv", "ogg", "asf", "mxf", "nut", "ivf", "dv", "gif", "apng"),
    *("h261", "h263", "h264", "hevc", "vvc", "m4v", "av1", "obu", "vc1", "mjpeg", "dirac"),
    *("wav", "mp3", "flac", "aac"),  # which hold no video, and are told so
    *("yuv4mpegpipe", "webp", "webp_anim", "jpegxl_anim", "ico"),
)
if PYAV < 18:  # which crashes where streams are found late and options are given for them
    CONTAINERS = tuple(name for name in CONTAINERS if name not in ("flv", "live_flv", "mpeg"))
FORMATS = (*CONTAINERS, *(f"{name}_pipe" for name in PICTURES.split()))
# "none" is no protocol: an empty list would allow all.
OPTIONS = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
OPTIONS |= {"enable_drefs": "0", "use_absolute_path": "0"}  # tracks of a MOV in other files
MOST_PIXELS = 1 << 27  # of a frame, decoded: 0.5 GB
LIMITS = {"max_pixels": str(MOST_PIXELS)}  # of every stream, from the first frame that is probed

HEAD = 4096  # bytes of a file that are looked at
_REFERS = {  # what a file starts with that only refers to others: a pattern, and what it is
    rb"#EXTM3U": "a playlist (HLS)",
    rb"ffconcat": "a list of files (ffconcat)",
    rb"(v=0\r?\n|[a-z]=.*\r?\n(.*\r?\n)*?m=(video|audio) )": "a description of a stream (SDP)",
    rb"(<\?xml[^>]*>\s*|<!--.*?-->\s*)*<MPD\b": "a playlist (DASH)",
    rb"(<\?xml[^>]*>\s*|<!--.*?-->\s*)*<SmoothStreamingMedia\b": "a playlist (Smooth Streaming)",
    rb"(<\?xml[^>]*>\s*|<!--.*?-->\s*|<!DOCTYPE[^>]*>\s*)*<svg\b": "a drawing (SVG)",
    rb"(<\?xml[^>]*>\s*|<!--.*?-->\s*)*<(smil|asx)\b": "a playlist (SMIL or ASX)",
    rb"\[(playlist|Reference)\]": "a playlist",
}
_REFERS_AT_ONCE = [(re.compile(p, re.DOTALL | re.IGNORECASE), what) for p, what in _REFERS.items()]


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], what: str, **options: str) -> Iterator[Any]:
    """The container of a media file.

    Args:
      path: The file.
      what: "picture" or "video", for what is said of others.
      options: More of FFmpeg's options of formats.

    Raises:
      InputError: it cannot be read, is damaged, is of an unknown kind, or refers to other files.
    """
    try:
        with open(_regular(path), "rb") as file:
            head = file.read(HEAD)
            if not head:
                raise InputError(f"{path} is empty")
            _check_start(path, head)
            file.seek(0)
            choices = dict(
                container_options=OPTIONS | options, options=LIMITS, io_open=_Refused(path)
            )
            with av.open(_Unnamed(file), **choices, **LENIENT) as container:
                yield container
    except av.FFmpegError as error:
        most = f"of at most {MOST_PIXELS / 1e6:.0f} megapixels"
        raise InputError(f"{path} is damaged, or no {what} that can be read ({most})") from error
    except OSError as error:
        reason = str(error.strerror or error).lower()
        raise InputError(f"cannot read {path}: {reason}") from error


def _regular(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Opening a named pipe would wait for whoever writes to it."""
    if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
        raise InputError(f"cannot read {path}: it is no ordinary file")
    return path


def _check_start(path: object, head: bytes) -> None:
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, what in _REFERS_AT_ONCE:
        if pattern.match(head):
            raise InputError(f"{path} is {what}: only the file itself is opened")


class _Unnamed:
    """A file without its name, of which FFmpeg would take "a:b.png" for a protocol, and "%03d.png"
    for a series.
    """

    def __init__(self, file: BinaryIO):
        self.name = "file"
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


class _Refused:
    """The callback that FFmpeg uses to open another file while it reads this one."""

    def __init__(self, path: object):
        self.path = path

    def __call__(self, url: str, flags: int, options: dict) -> NoReturn:
        del flags, options
        raise InputError(f"{self.path} refers to {url}: only the file itself is opened")
