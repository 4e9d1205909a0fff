"""Light and colours of clips: HDR, wide primaries, ranges and matrices, fields and transparency."""

import base64
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from test_clips import readable
from test_media import chart, far_off

from longlive_jax.filters import chain
from longlive_jax.media import read_clip, read_image

BT709, SMPTE170M, BT2020 = 1, 6, 9  # matrices and primaries of H.273
SDR, PQ, HLG = 1, 16, 18  # transfer characteristics
LUMA = {BT709: (0.2126, 0.0722), SMPTE170M: (0.299, 0.114), BT2020: (0.2627, 0.0593)}
# Linear RGB of BT.2020 to that of BT.709 (ITU-R BT.2087).
TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
)


def planes(rgb, matrix, full, bits):
    """Y'CbCr of R'G'B' from 0 to 1, by the equations of H.273."""
    kr, kb = LUMA[matrix]
    red, green, blue = np.moveaxis(rgb, -1, 0)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    differences = [(blue - luma) / (2 * (1 - kb)), (red - luma) / (2 * (1 - kr))]
    unit = 1 << (bits - 8)
    most = (1 << bits) - 1
    scales = (most, most, 0) if full else (219 * unit, 224 * unit, 16 * unit)
    found = [scales[2] + scales[0] * luma, *(128 * unit + scales[1] * d for d in differences)]
    return [np.clip(np.round(plane), 0, most).astype(np.uint16) for plane in found]


def write(path, frames, *, codec="libx264", matrix=BT709, full=False, pix_fmt="yuv444p", tags=None):
    """Writes frames of R'G'B' [H, W, 3] from 0 to 1. tags: (primaries, transfer)."""
    bits = 10 if "10" in pix_fmt else 8
    options = {"libx264": {"crf": "1"}, "libx265": {"x265-params": "crf=1:log-level=0"}}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16, options=options.get(codec, {}))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        tagged(stream.codec_context, matrix, full, tags)
        for pixels in frames:
            frame = av.VideoFrame(stream.width, stream.height, pix_fmt)
            tagged(frame, matrix, full, tags)
            found = planes(pixels, matrix, full, bits)
            if "420" in pix_fmt:
                found[1:] = [plane[::2, ::2] for plane in found[1:]]
            for plane, values in zip(frame.planes, found, strict=True):
                kind = np.uint16 if bits > 8 else np.uint8
                rows = np.zeros((plane.height, plane.line_size // kind().itemsize), kind)
                rows[:, : plane.width] = values
                plane.update(rows.tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def tagged(target, matrix, full, tags):
    target.colorspace, target.color_range = matrix, 2 if full else 1
    if tags:
        target.color_primaries, target.color_trc = tags


@pytest.mark.parametrize("matrix", LUMA)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le", "yuv444p10le"])
def test_matrices_and_ranges(tmp_path, matrix, full, pix_fmt):
    path = write(tmp_path / "a.mp4", [chart() / 255], matrix=matrix, full=full, pix_fmt=pix_fmt)
    assert far_off(read_clip(path, 64, 192, 16).frames[0]) <= 3


def pq(light):
    """PQ of light in cd/m2 (SMPTE ST 2084)."""
    power = (np.maximum(light, 0) / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(light):
    """HLG of light in cd/m2 on a screen of 1000 cd/m2 (ITU-R BT.2100)."""
    shown = light / 1000
    luma = shown @ np.array([0.2627, 0.678, 0.0593])
    scene = shown * np.maximum(luma, 1e-9)[..., None] ** (1 / 1.2 - 1)
    upper = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), upper)


def mapped(light):
    """The reference conversion: up to 0.8 of diffuse white as it is, above it compressed; BT.709 on
    a screen of BT.1886.
    """
    light = light / 203
    above = np.maximum(light - 0.8, 0) / 0.2
    toned = np.minimum(light, 0.8) + 0.2 * above / (1 + above)
    return 255 * np.clip(toned @ TO_BT709.T, 0, 1) ** (1 / 2.4)


GREYS = [[x, x, x] for x in (0, 1, 5, 20, 60, 120, 203, 400, 1000)]
COLOURED = [[100, 40, 30], [30, 90, 40], [30, 40, 90], [180, 150, 60], [120, 60, 110]]
LIGHT = np.array([*GREYS, *COLOURED, [203, 203, 203], [400, 300, 250]], float)  # cd/m2


def bars(values, height=32):
    return np.repeat(np.broadcast_to(values, (height, *values.shape)), 16, 1)


KINDS = {
    "pq.mp4": ("libx264", PQ, pq),
    "pq.mkv": ("libx265", PQ, pq),
    "pq.webm": ("libsvtav1", PQ, pq),
    "hlg.mp4": ("libx264", HLG, hlg),
    "hlg.mkv": ("libx265", HLG, hlg),
    "hlg.ts": ("libx264", HLG, hlg),
}


@pytest.mark.parametrize("name", KINDS)
def test_hdr_is_mapped_as_a_reference_conversion_does_it(tmp_path, name):
    """Greys within 2 of 255, colours within 6; diffuse white is nearly white."""
    codec, transfer, curve = KINDS[name]
    tags = (BT2020, transfer)
    choices = dict(codec=codec, matrix=BT2020, pix_fmt="yuv420p10le", tags=tags)
    path = write(tmp_path / name, [bars(curve(LIGHT))], **choices)
    clip = read_clip(path, 32, 16 * len(LIGHT), 16)
    assert clip.note == f"HDR ({'PQ' if transfer == PQ else 'HLG'}) tone-mapped to SDR"
    shown = clip.frames[0, 16, 8::16].astype(int)
    wrong = np.abs(shown - mapped(LIGHT)).max(1)
    greys = np.ptp(LIGHT, 1) == 0
    assert wrong[greys].max() <= 2 and wrong[~greys].max() <= 6
    white = shown[6]
    assert white.min() >= 240 and (np.diff(shown[: len(GREYS)].sum(1)) > 0).all()


def test_hdr_keeps_its_colours_where_it_is_scaled_and_from_frame_to_frame(tmp_path):
    dim = pq(np.full((64, 64, 3), 50.0))
    bright = pq(np.full((64, 64, 3), 203.0))
    choices = dict(matrix=BT2020, pix_fmt="yuv420p10le", tags=(BT2020, PQ))
    path = write(tmp_path / "a.mp4", [dim, bright, dim], **choices)
    shown = read_clip(path, 32, 32, 16).frames[:, 16, 16].astype(int)
    wanted = mapped(np.array([[x] * 3 for x in (50, 203, 50)], float))
    assert np.abs(shown - wanted).max() <= 2


@pytest.mark.parametrize("transfer", [1, 14])
def test_colours_of_bt2020_without_hdr(tmp_path, transfer):
    values = np.array([[0.5, 0.4, 0.3], [0.4, 0.6, 0.4], [0.3, 0.3, 0.5], [1, 1, 1], [0.2] * 3])
    choices = dict(matrix=BT2020, pix_fmt="yuv420p10le", tags=(BT2020, transfer))
    path = write(tmp_path / "a.mp4", [bars(values)], **choices)
    clip = read_clip(path, 32, 80, 16)
    assert clip.note == "colours of BT.2020 brought to BT.709"
    wanted = 255 * np.clip(values**2.4 @ TO_BT709.T, 0, 1) ** (1 / 2.4)
    assert np.abs(clip.frames[0, 16, 8::16] - wanted).max() <= 4


def fields(codec, path, count=8, *, top=True):
    """A bar that moves by 8 pixels from field to field, over a still one."""
    options = {"flags": "+ildct+ilme", "b": "8M"}
    unit = Fraction(1, 16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16, options=options)
        stream.height, stream.width, stream.pix_fmt = 64, 128, "yuv420p"
        for number in range(count):
            pixels = np.full((64, 128, 3), 16, np.uint8)
            for field in (0, 1):
                shown = 8 * (2 * number + (field if top else 1 - field))
                pixels[field::2, shown % 128 : shown % 128 + 16] = 220
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, unit
            graph = chain(frame, ("setfield", "tff" if top else "bff"))
            graph.push(frame)
            container.mux(stream.encode(graph.pull()))
        container.mux(stream.encode(None))
    return path


def combed(frames):
    """How much more neighbouring rows differ than rows of one field do."""
    grey = frames[..., 1].astype(int)
    neighbours = np.abs(np.diff(grey, axis=1)).mean()
    return neighbours - np.abs(grey[:, 2:] - grey[:, :-2]).mean()


@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize(
    ("codec", "suffix"),
    [("libx264", "mp4"), ("libx264", "mkv"), ("mpeg2video", "mpg"), ("mpeg2video", "ts")],
)
def test_fields_are_made_frames(tmp_path, codec, suffix, top):
    readable(f"a.{suffix}")
    path = fields(codec, tmp_path / f"a.{suffix}", top=top)
    clip = read_clip(path, 64, 128, 16)
    assert clip.note == "deinterlaced"
    assert len(clip.frames) == 8 and combed(clip.frames) < 2
    bar = [int(np.flatnonzero(frame[32, :, 1] > 110).mean()) for frame in clip.frames[:7]]
    assert np.abs(np.diff(bar) - 16).max() <= 4  # one field of each frame, in order
    some = read_clip(path, 64, 128, 16, last=4)
    np.testing.assert_array_equal(some.frames, clip.frames[-4:])


def rgba(number):
    """Half opaque, half hidden green."""
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[..., 1] = 255
    pixels[:16] = (50 + 80 * number, 50 + 80 * number, 50 + 80 * number, 255)
    return pixels


ANIMATED = {
    "a.webm": ("libvpx-vp9", "yuva420p"),
    "b.webm": ("libvpx", "yuva420p"),
    "a.mkv": ("libvpx-vp9", "yuva420p"),
    "a.png": ("apng", "rgba"),
    "a.gif": ("gif", "pal8"),
    "a.webp": ("libwebp_anim", "yuva420p"),
    "qtrle.mov": ("qtrle", "argb"),
    "prores.mov": ("prores_ks", "yuva444p10le"),
    "ffv1.mkv": ("ffv1", "yuva420p"),
}


def animate(path, codec, pix_fmt):
    options = {"libvpx": {"auto-alt-ref": "0"}, "libwebp_anim": {"lossless": "1"}}
    kind = {".png": "apng"}.get(path.suffix)
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10, options=options.get(codec, {}))
        stream.height, stream.width, stream.pix_fmt = 32, 32, pix_fmt
        if path.suffix == ".webm" or codec == "libvpx-vp9":
            stream.metadata["alpha_mode"] = "1"
        for number in range(3):
            if pix_fmt == "pal8":
                table = np.zeros((256, 4), np.uint8)  # A, R, G, B
                table[1] = (255, *(3 * [50 + 80 * number]))
                places = np.zeros((32, 32), np.uint8)
                places[:16] = 1
                frame = av.VideoFrame.from_ndarray((places, table), format="pal8")
            else:
                frame = av.VideoFrame.from_ndarray(rgba(number), format="rgba")
                frame = frame.reformat(format=pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("name", ANIMATED)
def test_animated_pictures_and_clips_with_alpha(tmp_path, name):
    if name == "a.webp" and "webp_anim" not in av.formats_available:
        pytest.skip("this FFmpeg decodes no animated WebP")
    opaque_below(read_clip(animate(tmp_path / name, *ANIMATED[name]), 32, 32, 10))


def opaque_below(clip):
    assert clip.note == "transparent parts made black"
    assert np.abs(clip.frames[:, 5, 5].astype(int) - [[50] * 3, [130] * 3, [210] * 3]).max() <= 6
    assert clip.frames[:, 22:].max() <= 6


# An AVIF and an animated one of `rgba`, with a stream for alpha, as libavif writes them.
AVIF = """
c-muNU{FXasVqn=%S>Yc0uY^>nP!-qnV9D5Xz0kmz}S|XT9U{B0g4$ZIYm%5LqTS82?HA7E66O#1+y4|SSK?lKN-YvVPIeai
vTg>X&`M1<U@GtfV3<SJ7s3(ft>)Bkpgm3nV{w*mKhj2=jY^uZAQp2L1Y|r3NjKQGDWFrFn1)DR^))~1lf8xv!JK|NYBkINX
`e+BALYnsZf;)P%Kc8S&<16VCLZ908%`OWrog;3Sc$D$@w`&dC55yK+|{`*cu=ng(zo4C}xlW30MHFb_Ov@i}I{;3sTd;gp*
ZrW^#d5ab<ByYHqO=P)%k|W@1sLRU*v!a+w9Wuy6)CoQ098nT3Igg^{(59Vil&o03=}#K6TWA!z?i)JRCM0qB-
3@6Q!)>f18^Aaj7k0iYy@1yFK=z=cdBbs;8auLegJd7uZ5Je(VTaoh8tiz?q=94M@BaZX>Kd3Q^u!w!e61pv=JZIJ
"""
AVIF_SEQUENCE = """
c-pm8-Afcv6u&dOrs)=&ZBVhwL_$5R<Ss(859zuh5{Q8m^(52Gtb1{;Gt69<-
4anWDKP3qBBBqFUU~=uA&S7jf<EX&dI)^zq0oBqALt=F_s&eaPHL8R;m$etoO93b%(=gN5kj#HEtql++Xx284AY67iDTPnA~
+K#Sk82&;wglLaiUQfIpaW9)h$;?CRQl&jh!Z@glhuK7}gDiE!q$gxdmo<H^>C6omDx=I+(2(_h<M{=GhMmO?30fxrTV!&<&
1U^oWiprJGsV@mN~Mt3w{h>l~Az&SKLtLEglsVt|Zb+tl1h$(>;n=P@$`Dk>^KgydX2JtFa#-
HM@G{feH4Y&+1lVdqDkaG@BCqRh|)&}pU&Sp7+2YQ6l^npCi2ChdYvHDV_r2J2Y13Q5^3zZRRs>oXJ{6vWXW5`#k7IJBs&lN
d%0Jb9AKs)8H#wNZ=~W#HSgJJ?SPrN<)pj>)%fLF*1^w0N9aav$hf+Q;#Q-|-#WuNu($n5)*{9R^TGQz>I-
ou=E=#dCKEv6VT5`$Wa8b1|Z>-
5YQ3$!8m4vT%kte2nBsR`r!zr#il<T4WsahXyQNa&%#zP0#9}PukR0OJXiC&aTlC_VW_z0NLS1RHnK*rL+Nny{jM2Uf$|Iur
;hGHvhvxcau$dcfBG4Fj<jNC{`)4dp;&5@SQ6G4)ALXe0MK!#HRdmp^|G3HrrmAPaNF<lf*4#QiM8(6yi^U`!M|lyFP4|U4W
bOS3I;yb{%us_1MR*d;gJL&hzG{5_|6OKRkC^ML|wIZ~7=$zB&cbXQIlq8dYv*R6F#83{EEYgwY5>@Rm<6j0GP~oLcO8adc+
58YRLFfv0eV+9#M-LK7yp1%+VIcBut&g(NrE)$n_qka#*q<LSBXgBQ!DPSEd1-
aYyFQdqunqpIl<%iLJZELIJ}+0+J_7jA#Kd^$T-KmVz(rg_(cx1;I#Yh!b-
ulE$rkJq&yesc@<Nkw!3xP#`ZYnEPhE!EE~s)Mt4pAWVD1cVtyuK
"""


def packed(text):
    return zlib.decompress(base64.b85decode(text.replace("\n", "")))


def test_avif_with_alpha(tmp_path):
    (tmp_path / "a.avif").write_bytes(packed(AVIF))
    for read in (
        read_image(tmp_path / "a.avif", 32, 32),
        read_clip(tmp_path / "a.avif", 32, 32, 16),
    ):
        assert read.note == "transparent parts made black"
        assert np.abs(read.frames[0, 5, 5].astype(int) - (200, 100, 50)).max() <= 6
        assert read.frames[0, 22:].max() <= 6
    (tmp_path / "b.avif").write_bytes(packed(AVIF_SEQUENCE))
    opaque_below(read_clip(tmp_path / "b.avif", 32, 32, 10))
