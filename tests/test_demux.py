"""Only the file that is named is opened: what makes FFmpeg open others is refused by a sentence."""

import contextlib
import os
import pathlib
import socket
import threading
import zlib

import av
import numpy as np
import pytest

from longlive_jax import demux
from longlive_jax.data import folder
from longlive_jax.demux import MOST_PIXELS
from longlive_jax.errors import InputError
from longlive_jax.media import read_clip, read_image
from longlive_jax.video import VideoWriter

READERS = {
    "picture": lambda path: read_image(path, 64, 64),
    "clip": lambda path: read_clip(path, 64, 64, 16),
    "footage": folder.footage,
}
# What refers to {url}, and the end of the sentence that refuses it.
REFERRING = {
    "hls": ("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n", "(HLS)"),
    "hls after a mark": ("\ufeff#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n", "(HLS)"),
    "ffconcat": ("ffconcat version 1.0\nfile '{url}'\n", "(ffconcat)"),
    "sdp": (
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        "m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "(SDP)",
    ),
    "dash": (
        '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"'
        ' mediaPresentationDuration="PT9S"><Period><AdaptationSet mimeType="video/mp4">'
        '<Representation id="0" bandwidth="1"><BaseURL>{url}</BaseURL>'
        "<SegmentBase/></Representation></AdaptationSet></Period></MPD>\n",
        "(DASH)",
    ),
    "svg": (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        ' width="64" height="64"><image xlink:href="{url}" width="64" height="64"/></svg>',
        "(SVG)",
    ),
}


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    """A clip that nobody names."""
    path = tmp_path_factory.mktemp("secret") / "secret.mp4"
    with VideoWriter(path, 16) as writer:
        writer.write(np.full((4, 64, 64, 3), 200, np.uint8))
    return path


@pytest.fixture
def server():
    """The port of a server that keeps who connected to it."""
    visits = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, address = listening.accept()
                    visits.append(address)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1], visits
        # After this one of ours nobody else is waiting to be accepted.
        socket.create_connection(listening.getsockname()).close()
        listening.shutdown(socket.SHUT_RDWR)


def addresses(secret, port):
    yield f"http://127.0.0.1:{port}/secret.mp4"
    yield f"tcp://127.0.0.1:{port}"
    yield str(secret)
    yield f"file:{secret}"


@pytest.mark.parametrize("name", ["clip.mp4", "list.m3u8", "list.txt", "clip.sdp", "picture.png"])
@pytest.mark.parametrize("kind", REFERRING)
def test_what_refers_to_other_files_is_refused(tmp_path, secret, server, kind, name):
    port, visits = server
    text, said = REFERRING[kind]
    for url in addresses(secret, port):
        path = tmp_path / name
        path.write_text(text.replace("{url}", url).replace("{port}", str(port)), "utf-8")
        for read in READERS.values():
            with pytest.raises(InputError, match="only the file itself is opened") as caught:
                read(path)
            assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not visits


@pytest.mark.parametrize("kind", ["hls", "ffconcat", "sdp", "dash"])
def test_ffmpeg_itself_opens_nothing_else(tmp_path, secret, server, monkeypatch, kind):
    """Also where the first bytes are not recognised, and where the format's name would do."""
    port, visits = server
    monkeypatch.setattr(demux, "_check_start", lambda path, head: None)
    for formats in (demux.OPTIONS["format_whitelist"], None):
        choices = {k: v for k, v in demux.OPTIONS.items() if formats or k != "format_whitelist"}
        monkeypatch.setattr(demux, "OPTIONS", choices)
        for url in addresses(secret, port):
            path = tmp_path / "clip.mp4"
            text = REFERRING[kind][0].replace("{url}", url).replace("{port}", str(port))
            path.write_text(text, "utf-8")
            for read in READERS.values():
                with pytest.raises(InputError):
                    read(path)
    assert not visits


def test_the_list_of_formats_names_formats():
    """A misspelt name would refuse files of that format."""
    known = {name for formats in av.formats_available for name in formats.split(",")}
    newer = {"webp_anim", "jpegxs_pipe", "vvc", "xpm_pipe"}  # not in every FFmpeg
    assert set(demux.FORMATS) - known <= newer
    refer = {"hls", "concat", "sdp", "rtsp", "dash", "image2", "image2pipe", "lavfi", "svg_pipe"}
    assert not refer & set(demux.FORMATS)


def reference_to(path: pathlib.Path, film: bytes) -> bytes:
    """A MOV whose data reference (`dref`) is an alias of another file, by its absolute path."""
    target = str(path).encode()
    alias = b"alis" + (0).to_bytes(4, "big")  # flags 0: not in this file
    record = bytearray(150)
    record[4:6] = (150).to_bytes(2, "big")
    record[8:10] = b"\0\2"
    name = path.name.encode()[:63]
    record[50 : 51 + len(name)] = bytes([len(name)]) + name
    record[130:134] = (1).to_bytes(2, "big") + (1).to_bytes(2, "big")
    tail = (2).to_bytes(2, "big") + len(target).to_bytes(2, "big") + target
    tail += b"\0" * (len(target) % 2) + b"\xff\xff\0\0"
    body = alias + bytes(record) + tail
    entry = (len(body) + 4).to_bytes(4, "big") + body
    at = film.index(b"dref") - 4
    size = int.from_bytes(film[at : at + 4], "big")
    dref = (16 + len(entry)).to_bytes(4, "big") + film[at + 4 : at + 16] + entry
    grown = film[:at] + dref + film[at + size :]
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        where = grown.index(box) - 4
        length = int.from_bytes(grown[where : where + 4], "big") + len(dref) - size
        grown = grown[:where] + length.to_bytes(4, "big") + grown[where + 4 :]
    return grown


def test_a_track_of_a_mov_lies_in_the_file_itself(tmp_path, secret, monkeypatch):
    """Whatever its table of data references says; FFmpeg would open what it names if let."""
    path = tmp_path / "clip.mov"
    path.write_bytes(reference_to(secret, secret.read_bytes()))
    opened = []
    real = demux._Refused.__call__

    def noted(self, url, flags, options):
        opened.append(url)
        return real(self, url, flags, options)

    monkeypatch.setattr(demux._Refused, "__call__", noted)
    with contextlib.suppress(InputError):
        read_clip(path, 64, 64, 16)
    assert not opened
    loose = demux.OPTIONS | {"enable_drefs": "1", "use_absolute_path": "1"}
    monkeypatch.setattr(demux, "OPTIONS", loose)
    with pytest.raises(InputError):
        read_clip(path, 64, 64, 16)
    assert opened  # the table was made well: with the option it is followed, up to the callback


def chunk(kind, data):
    """Of a PNG."""
    check = zlib.crc32(kind + data).to_bytes(4, "big")
    return len(data).to_bytes(4, "big") + kind + data + check


def test_a_picture_that_claims_to_be_huge_is_refused(tmp_path):
    """By its header, before anything of that size is there."""
    side = 1 << 14  # of 1 bit: 33 MB, that deflate packs into a thousandth
    assert side * side > MOST_PIXELS
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    pixels = zlib.compress(bytes((side // 8 + 1) * side))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    path = tmp_path / "huge.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    with pytest.raises(InputError, match="at most 134 megapixels"):
        read_image(path, 64, 64)


def test_a_clip_that_claims_to_be_huge_is_refused(secret, monkeypatch):
    monkeypatch.setattr(demux, "MOST_PIXELS", 64 * 64 - 1)
    with pytest.raises(InputError, match="is 64x64, more than 0 megapixels"):
        read_clip(secret, 64, 64, 16)


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "clip.mp4")
    with pytest.raises(InputError, match="it is no ordinary file"):
        read_clip(tmp_path / "clip.mp4", 64, 64, 16)
