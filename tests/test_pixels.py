"""Pictures of Python: PIL images and arrays of every kind become what a file of them becomes."""

import io

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import parity
import pytest

from longlive_jax import demux, pixels
from longlive_jax.errors import InputError
from longlive_jax.media import read_image

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (12, 20, 3), np.uint8)
GREY = RGB[..., 0]
ALPHA = RANDOM.integers(0, 256, (12, 20, 1), np.uint8)
RGBA = np.concatenate([RGB, ALPHA], -1)
OVER_BLACK = np.rint(RGB * (ALPHA / 255.0)).astype(np.uint8)
TRANSPARENT = "transparent parts made black"


def grey(x):
    return np.repeat(x[..., None], 3, -1)


ARRAYS = {
    "RGB": (RGB, RGB, ""),
    "RGB, apart in memory": (np.asfortranarray(RGB)[:, ::-1][:, ::-1], RGB, ""),
    "grey": (GREY, grey(GREY), ""),
    "grey, one channel": (GREY[..., None], grey(GREY), ""),
    "RGBA": (RGBA, OVER_BLACK, TRANSPARENT),
    "opaque RGBA": (np.concatenate([RGB, ALPHA * 0 + 255], -1), RGB, ""),
    "grey and alpha": (RGBA[..., [0, 3]], grey(OVER_BLACK[..., 0]), TRANSPARENT),
    "float32": (RGB.astype(np.float32) / 255, RGB, ""),
    "float64": (RGB / 255.0, RGB, ""),
    "float64, grey": (GREY / 255.0, grey(GREY), ""),
    "bfloat16": ((RGB // 128).astype(ml_dtypes.bfloat16), RGB // 128 * 255, ""),
    "float, beyond by rounding": (np.where(RGB > 127, 1.0005, -0.0005), (RGB > 127) * 255, ""),
    "of JAX": (jnp.asarray(RGB), RGB, ""),
    "of JAX, float": (jnp.asarray(RGB, jnp.float32) / 255, RGB, ""),
}


@pytest.mark.parametrize(("source", "told", "note"), ARRAYS.values(), ids=ARRAYS)
def test_an_array_is_a_picture(source, told, note):
    got, said = pixels.picture(source)
    assert got.dtype == np.uint8 and got.flags.c_contiguous and said == note
    np.testing.assert_array_equal(got, told)


def test_an_array_of_pytorch_is_a_picture():
    torch = parity.needed("torch")
    np.testing.assert_array_equal(pixels.picture(torch.from_numpy(RGB))[0], RGB)
    np.testing.assert_array_equal(pixels.picture(torch.from_numpy(RGB) / 255)[0], RGB)
    with pytest.raises(InputError, match="cannot be made an array"):
        pixels.picture(torch.zeros(3, 4, 3, requires_grad=True))


class Interface:
    """What hands over its numbers by the array interface alone."""

    def __init__(self, array):
        self.array = array
        self.__array_interface__ = array.__array_interface__


def test_the_array_interface_is_enough():
    np.testing.assert_array_equal(pixels.picture(Interface(RGB))[0], RGB)


REFUSED = {
    "int64": (RGB.astype(np.int64), r"is uint8, or floating numbers from 0 to 1, not int64 \[12"),
    "int16": (RGB.astype(np.uint16), "not uint16"),
    "truth": (RGB > 3, "not bool"),
    "0 to 255": (RGB.astype(np.float32), "from 0 to 255: scale them to 0 to 1, or give uint8"),
    "-1 to 1": (RGB / 127.5 - 1, "from -1 to 1: scale them"),
    "NaN": (RGB * np.nan, "from nan to nan"),
    "channels first": (RGB.transpose(2, 0, 1), "channels come first, but belong last"),
    "five channels": (
        np.zeros((3, 3, 5), np.uint8),
        r"is uint8 \[H, W, 3\], not uint8 \[3, 3, 5\]",
    ),
    "a clip": (RGB[None], r"is uint8 \[H, W, 3\], not uint8 \[1, 12, 20, 3\]"),
    "empty": (RGB[:0], r"of shape \[0, 20, 3\] is empty"),
    "a list": ([[0, 1]], "is a file, a PIL image or an array, not a list"),
    "nothing known": (object(), "not a object"),
    "a number": (3, "not a int"),
    "bytes": (b"\x89PNG", "not a bytes"),
}


@pytest.mark.parametrize(("source", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_picture_is_one_sentence(source, said):
    with pytest.raises(InputError, match=said) as caught:
        pixels.picture(source)
    assert "\n" not in str(caught.value)


def of_mode(mode):
    return parity.needed("PIL.Image").fromarray(RGB).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_opaque_mode_is_read(mode):
    got, note = pixels.picture(of_mode(mode))
    np.testing.assert_array_equal(got, np.asarray(of_mode(mode).convert("RGB")))
    assert not note


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "PA"])
def test_every_transparent_mode_is_over_black(mode):
    pil = parity.needed("PIL.Image")
    image = pil.fromarray(RGBA).convert("RGBA" if mode != "LA" else "LA")
    image = image if mode == "PA" else image.convert(mode)
    if mode == "PA":
        image = of_mode("P").convert("PA")
        image.putalpha(pil.fromarray(ALPHA[..., 0]))
    colours, note = pixels.picture(image)
    wide = np.asarray(image.convert("RGBA")).astype(float)
    told = wide[..., :3] * wide[..., 3:] / 255
    assert note == TRANSPARENT and np.abs(colours - told).max() <= 0.5


def test_a_transparent_colour_of_a_palette_is_black():
    image = of_mode("L").convert("P")
    image.info["transparency"] = int(np.asarray(image)[3, 4])
    colours, note = pixels.picture(image)
    hidden = np.asarray(image) == image.info["transparency"]
    assert note == TRANSPARENT and not colours[hidden].any()
    np.testing.assert_array_equal(colours[~hidden], np.asarray(image.convert("RGB"))[~hidden])


def test_sixteen_bits_are_scaled():
    pil = parity.needed("PIL.Image")
    deep = pil.fromarray(GREY.astype(np.uint16) * 257)
    assert deep.mode.startswith("I;16")
    np.testing.assert_array_equal(pixels.picture(deep)[0], grey(GREY))


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_modes_without_a_range_are_refused(mode):
    pil = parity.needed("PIL.Image")
    image = pil.new(mode, (4, 4))
    with pytest.raises(InputError, match=f'a PIL image of mode "{mode}": make it "RGB"'):
        pixels.picture(image)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_an_orientation_is_applied_as_for_files(tmp_path, orientation, suffix):
    pil = parity.needed("PIL.Image")
    flat = np.zeros((32, 48, 3), np.uint8)
    flat[:16, :24, 0] = flat[:16, 24:, 1] = flat[16:, :24, 2] = 255
    image = pil.fromarray(flat)
    exif = image.getexif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    image.save(path, exif=exif, **({"quality": 100, "subsampling": 0} if suffix == "jpg" else {}))
    with pil.open(path) as opened:
        got, note = pixels.picture(opened)
    of_file = read_image(path, *got.shape[:2])
    assert note == of_file.note == ("turned upright" if orientation > 1 else "")
    assert np.abs(got.astype(int) - of_file.frames[0]).max() <= 3


def animation():
    pil = parity.needed("PIL.Image")
    data = io.BytesIO()
    frames = [pil.new("RGB", (8, 8), (80 * i, 0, 0)) for i in range(3)]
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:])
    return pil.open(data)


def test_an_animation_is_no_picture_and_no_clip():
    with pytest.raises(InputError, match="holds more than one picture"):
        pixels.picture(animation())
    with pytest.raises(InputError, match="an animated one is read from its file"):
        pixels.clip(animation())


def test_half_a_picture_is_damaged():
    pil = parity.needed("PIL.Image")
    data = io.BytesIO()
    pil.fromarray(RANDOM.integers(0, 256, (64, 64, 3), np.uint8)).save(data, "PNG")
    with pytest.raises(InputError, match="the picture is damaged"):
        pixels.picture(pil.open(io.BytesIO(data.getvalue()[:-2000])))


def test_a_picture_of_many_pixels_is_refused_before_it_is_converted(monkeypatch):
    pil = parity.needed("PIL.Image")
    monkeypatch.setattr(demux, "MOST_PIXELS", 239)
    with pytest.raises(InputError, match="is 20x12, more than"):
        pixels.picture(pil.fromarray(RGB))


CLIP = RANDOM.integers(0, 256, (4, 6, 10, 3), np.uint8)
CLIPS = {
    "array": (CLIP, CLIP),
    "float": (CLIP / 255.0, CLIP),
    "of JAX": (jnp.asarray(CLIP), CLIP),
    "grey": (CLIP[..., 0], grey(CLIP[..., 0])),
    "one channel": (CLIP[..., :1], grey(CLIP[..., 0])),
    "list": ([*CLIP], CLIP),
    "tuple of floats": (tuple(CLIP / 255.0), CLIP),
    "mixed list": ([CLIP[0], jnp.asarray(CLIP[1]), CLIP[2] / 255.0, CLIP[3]], CLIP),
}


@pytest.mark.parametrize(("source", "told"), CLIPS.values(), ids=CLIPS)
def test_frames_are_a_clip(source, told):
    got, note = pixels.clip(source)
    assert got.dtype == np.uint8 and not note
    np.testing.assert_array_equal(got, told)


def test_pil_images_are_a_clip():
    pil = parity.needed("PIL.Image")
    got, note = pixels.clip([pil.fromarray(x).convert("RGBA") for x in CLIP])
    assert not note
    np.testing.assert_array_equal(got, CLIP)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([], "the clip is empty"),
        (CLIP[:0], "the clip is empty"),
        (CLIP[0], r"a clip is uint8 \[t, H, W, 3\], not uint8 \[6, 10, 3\]"),
        ([CLIP[0], CLIP[1, :5]], "of one size: frame 1 is 10x5, the first 10x6"),
        ([CLIP[0], "b.png"], "frame 1 of the clip is a file"),
        ([CLIP[0], CLIP[1].astype(int)], "frame 1 of the clip is uint8"),
        (CLIP[None], r"not uint8 \[1, 4, 6, 10, 3\]"),
        ({"a": 1}, "not a dict"),
    ],
)
def test_what_is_no_clip_is_one_sentence(source, said):
    with pytest.raises(InputError, match=said):
        pixels.clip(source)
