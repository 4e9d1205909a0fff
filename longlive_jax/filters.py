"""FFmpeg's filters on decoded frames: which way up, deinterlaced, HDR and wide colours to BT.709.

The graphs hold nothing but filters that every build of FFmpeg has; none of them opens a file.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

import av
import av.filter
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import ColorRange

Turn = tuple[bool, bool, bool]  # transpose, then reverse the columns, then the rows

# Numbers of ITU-T H.273.
HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics
WIDE = {9: "BT.2020", 12: "Display P3"}  # colour primaries
# Linear RGB of those to that of BT.709, by rows.
_TO_BT709 = {
    9: ((1.6605, -0.5877, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1188)),
    12: ((1.2249, -0.2249, 0.0), (-0.0421, 1.0421, 0.0), (-0.0196, -0.0786, 1.0982)),
}
HLG, BT2020, UNSAID = 18, 9, 2

DIFFUSE_WHITE = 203  # cd/m2 (ITU-R BT.2408), which becomes almost the white of SDR
KNEE = 0.8  # of diffuse white: darker light is kept as it is, brighter light is compressed
GAMMA = 2.4  # of an SDR screen (ITU-R BT.1886)
# Light, of the brightest there is, by values of PQ (SMPTE ST 2084) and HLG (ITU-R BT.2100), which
# is that of a scene: expressions of `lutrgb`.
_POWER = "pow(val/maxval, 32/2523)"
_LIGHT = {
    16: f"pow(max({_POWER}-3424/4096, 0)/(2413/128-2392/128*{_POWER}), 16384/2610)",
    18: "if(lte(val/maxval, 0.5), pow(val/maxval, 2)/3,"
    " (exp((val/maxval-0.55991073)/0.17883277)+0.28466892)/12)",
}
BRIGHTEST = {16: 10000, 18: 1000}  # cd/m2; for HLG that is the screen it is mapped to
SYSTEM_GAMMA = 1.2  # of HLG on such a screen: scene light times a power of its luminance
_LUMINANCE = ((0.2627, 0.6780, 0.0593),) * 3  # of BT.2020


def chain(frame: av.VideoFrame, *steps: tuple[str, str]) -> av.filter.Graph:
    """Return a configured graph of filters in a row for frames like this one.

    steps: (name, arguments) of each filter.
    """
    graph = av.filter.Graph()
    nodes = [_source(graph, frame), *(graph.add(*step) for step in steps)]
    graph.link_nodes(*nodes, graph.add("buffersink"))
    graph.configure()
    return graph


def _source(graph: av.filter.Graph, frame: av.VideoFrame) -> av.filter.context.FilterContext:
    return graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format=frame.format,
        time_base=frame.time_base or Fraction(1, 1000),
    )


def turn_of(frame: av.VideoFrame) -> Turn:
    """Return how a frame is made upright, mirrored or not, by its display matrix."""
    # PyAV reads no side data at all where there is a kind that it does not know, such as EXIF.
    unknown = set(range(64)) - {kind.value for kind in SideData}
    graph = chain(frame, *(("sidedata", f"mode=delete:type={kind}") for kind in unknown))
    graph.push(frame)
    matrix = graph.pull().side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return (False, False, False)
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # x' = ax + cy, y' = bx + dy
    return (True, c < 0, b < 0) if abs(b) > abs(a) else (False, a < 0, d < 0)


def merge_alpha(colour: av.VideoFrame, alpha: av.VideoFrame) -> av.VideoFrame:
    """Return the frame with the grey values of another one as its alpha."""
    graph = av.filter.Graph()
    merge, sink = graph.add("alphamerge"), graph.add("buffersink")
    sources = [_source(graph, colour), _source(graph, alpha)]
    for place, source in enumerate(sources):
        source.link_to(merge, 0, place)
    merge.link_to(sink)
    graph.configure()
    for source, frame in zip(sources, (colour, alpha), strict=True):
        source.push(frame)
        source.push(None)
    merged = graph.pull()
    # The format with alpha is in studio range, whichever that of the colours was.
    merged.colorspace, merged.color_range = colour.colorspace, ColorRange.MPEG
    merged.color_trc, merged.color_primaries = colour.color_trc, colour.color_primaries
    return merged


Numbered = tuple[int, av.VideoFrame]
Deinterlaced = tuple[int, av.VideoFrame, bool]  # whether the filter made it out of fields


def deinterlace(frames: Iterable[Numbered]) -> Iterator[Deinterlaced]:
    """Deinterlace what is flagged as interlaced; pass the rest on as it is.

    From the first such frame on all go through `bwdif`, which looks one frame back and one ahead.
    """
    before: Numbered | None = None
    graph, shape = None, None
    waiting: collections.deque[tuple[int, bool]] = collections.deque()
    for number, frame in frames:
        like = (frame.width, frame.height, frame.format.name)
        if graph is not None and like != shape:
            yield from _finished(graph, waiting)
            graph = before = None
        if graph is None and frame.interlaced_frame:
            graph, shape = chain(frame, ("bwdif", "mode=send_frame:deint=interlaced")), like
            if before is not None and _like(before[1]) == like:
                graph.push(before[1])
                waiting.append((-1, False))  # it was passed on already
        if graph is None:
            before = (number, frame)
            yield number, frame, False
            continue
        graph.push(frame)
        waiting.append((number, frame.interlaced_frame))
        yield from _ready(graph, waiting)
    if graph is not None:
        yield from _finished(graph, waiting)


def _like(frame: av.VideoFrame) -> tuple[int, int, str]:
    return frame.width, frame.height, frame.format.name


def _ready(
    graph: av.filter.Graph, waiting: collections.deque[tuple[int, bool]]
) -> Iterator[Deinterlaced]:
    while waiting:
        try:
            frame = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        number, changed = waiting.popleft()
        if number >= 0:
            yield number, frame, changed


def _finished(
    graph: av.filter.Graph, waiting: collections.deque[tuple[int, bool]]
) -> Iterator[Deinterlaced]:
    graph.push(None)
    yield from _ready(graph, waiting)
    waiting.clear()


def is_wide(transfer: int, primaries: int) -> bool:
    """Return whether light or colours, by their numbers in H.273, are not those of BT.709."""
    return transfer in HDR or primaries in WIDE


class ToBT709:
    """Brings RGB of HDR or of wide primaries to BT.709.

    HDR light is first tone-mapped, each channel by itself: up to `KNEE` of diffuse white it is kept
    as it is, and what is brighter approaches that white, so that highlights keep their shape.
    Colours that BT.709 lacks are clipped. The graph is kept for the next frame.
    """

    def __init__(self) -> None:
        self._kind: tuple[int, ...] | None = None
        self._graph: av.filter.Graph | None = None
        self._count = 0

    def __call__(
        self, frame: av.VideoFrame, transfer: int, primaries: int
    ) -> tuple[av.VideoFrame, str]:
        """Return the frame in gbrp16le, and what was done.

        Args:
          frame: In gbrp16le.
          transfer: Number of its transfer characteristics in H.273.
          primaries: Of its primaries; where HDR does not say, they are those of BT.2020.
        """
        kind = (frame.width, frame.height, transfer, primaries)
        if self._graph is None or kind != self._kind:
            self._graph, self._kind = _bt709_graph(frame, transfer, primaries), kind
        self._count += 1
        frame.pts, frame.time_base = self._count, Fraction(1, 1000)  # `blend` pairs by time
        self._graph.push(frame)
        mapped = self._graph.pull()
        if transfer in HDR:
            return mapped, f"HDR ({HDR[transfer]}) tone-mapped to SDR"
        return mapped, f"colours of {WIDE[primaries]} brought to BT.709"


def _bt709_graph(frame: av.VideoFrame, transfer: int, primaries: int) -> av.filter.Graph:
    graph = av.filter.Graph()
    end = _source(graph, frame)
    value = "val/maxval"
    if transfer == HLG:
        end = _screen_light(graph, end)
    elif transfer in HDR:
        value = _LIGHT[transfer]
    tone = f"pow({value}, {GAMMA})"
    if transfer in HDR:
        light = f"st(0, {BRIGHTEST[transfer]}/{DIFFUSE_WHITE}*{value})"
        above = f"st(1, max(ld(0)-{KNEE}, 0)/{1 - KNEE:.6g})"
        tone = f"{light}; {above}; min(ld(0), {KNEE})+{1 - KNEE:.6g}*ld(1)/(1+ld(1))"
    steps = [_look_up(tone)]
    unsaid = transfer in HDR and primaries == UNSAID
    matrix = _TO_BT709.get(BT2020 if unsaid else primaries)
    if matrix is not None:
        steps.append(_mix(matrix))
    steps.append(_look_up(f"pow(val/maxval, 1/{GAMMA})"))
    nodes = [graph.add(*step) for step in steps]
    graph.link_nodes(end, *nodes, graph.add("buffersink"))
    graph.configure()
    return graph


def _screen_light(
    graph: av.filter.Graph, source: av.filter.context.FilterContext
) -> av.filter.context.FilterContext:
    """Link the filters that make light of a screen of values of HLG; return the last of them."""
    scene, split = graph.add(*_look_up(_LIGHT[HLG])), graph.add("split")
    mixed = graph.add(*_mix(_LUMINANCE))
    gain = graph.add(*_look_up(f"pow(val/maxval, {SYSTEM_GAMMA - 1:.6g})"))
    product = graph.add("blend", "all_mode=multiply")
    graph.link_nodes(source, scene, split)
    split.link_to(product, 0, 0)
    split.link_to(mixed, 1, 0)
    graph.link_nodes(mixed, gain)
    gain.link_to(product, 0, 1)
    return product


def _mix(matrix: Sequence[Sequence[float]]) -> tuple[str, str]:
    """Return the filter that multiplies RGB with a matrix."""
    names = (f"{to}{source}" for to in "rgb" for source in "rgb")
    values = (value for row in matrix for value in row)
    mixed = (f"{name}={value}" for name, value in zip(names, values, strict=True))
    return "colorchannelmixer", ":".join(mixed)


def _look_up(expression: str) -> tuple[str, str]:
    """Return the filter that replaces each value of each channel: from 0 to 1 by 0 to 1."""
    split = expression.rpartition("; ")
    whole = f"{split[0]}{split[1]}maxval*({split[2]})"
    return "lutrgb", ":".join(f"{channel}='{whole}'" for channel in "rgb")
