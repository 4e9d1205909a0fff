"""Checkpoints that are damaged, or made to harm: refused in a sentence, before memory is taken."""

import collections
import io
import json
import os
import pickle
import resource
import struct
import zipfile

import ml_dtypes
import numpy as np
import parity
import pytest
from safetensors.numpy import save_file

from longlive_jax import documents, lora, weights
from longlive_jax.convert import finite, pickles, source
from longlive_jax.convert.source import open_checkpoint
from longlive_jax.errors import InputError


def refused(path):
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Numbers that are not finite.

KINDS = [*finite._LEAST]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_numbers_are_finite_where_numpy_says_so(kind):
    """Of types with two bytes, and one, all there are."""
    if kind.itemsize <= 2:
        numbers = np.arange(1 << 8 * kind.itemsize, dtype=f"u{kind.itemsize}").view(kind)
    else:
        ends = [np.inf, -np.inf, np.nan, -np.nan, 0, -0.0, np.finfo(kind).max, np.finfo(kind).min]
        drawn = np.random.default_rng(0).integers(0, 256, 4096, np.uint8).view(kind)
        numbers = np.concatenate([np.array(ends, kind), drawn])
    with np.errstate(invalid="ignore"):
        expected = np.isfinite(numbers.astype(np.float64))
    found = [finite.finite(numbers[i : i + 1]) for i in range(len(numbers))]
    np.testing.assert_array_equal(found, expected)
    assert finite.finite(numbers[expected]) and not finite.finite(numbers)


def test_one_number_anywhere_is_found():
    """Beyond the first block, in arrays of any layout."""
    x = np.zeros((700, 900), np.float32)
    for where in ((0, 0), (699, 899), (300, 7)):
        for value in (np.nan, -np.inf):
            bad = x.copy()
            bad[where] = value
            assert not finite.finite(bad) and not finite.finite(bad.T)
            assert not finite.finite(bad[::1, where[1] :: 2])
    assert finite.finite(x) and finite.finite(np.zeros((0, 3), np.float32))
    assert finite.finite(np.full(4, -1, np.int16)) and finite.finite(np.array([True]))
    scale = np.array([0, 254, 255], np.uint8).view(ml_dtypes.float8_e8m0fnu)
    assert finite.finite(scale[:2]) and not finite.finite(scale)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_is_named_when_it_is_read(tmp_path, value):
    path = tmp_path / "a.safetensors"
    save_file({"good": np.ones(3, np.float32), "bad": np.array([0, value], np.float32)}, path)
    tensors = open_checkpoint(path).groups[""]
    assert tensors["good"].tolist() == [1, 1, 1]
    for held in (tensors, tensors.renamed({"other": "bad"})):
        with pytest.raises(InputError, match=f'"{path}" is damaged: bad holds NaN or infinity'):
            list(held.values())
    with pytest.raises(InputError, match="bad holds NaN"):
        weights.load(path)
    torch = parity.needed("torch")
    torch.save({"generator": {"bad": torch.tensor([0, value])}}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a.pt.* generator.bad holds NaN or infinity"):
        open_checkpoint(tmp_path / "a.pt").groups["generator"]["bad"]


def pair(rank=2, value=1.0):
    name = "diffusion_model.blocks.0.self_attn.q.lora_{}.weight"
    shapes = {"down": (rank, 8), "up": (8, rank)}
    return {name.format(n): np.full(shape, value, np.float32) for n, shape in shapes.items()}


def test_a_lora_is_finite(tmp_path):
    path = tmp_path / "a.safetensors"
    alpha = "diffusion_model.blocks.0.self_attn.q.alpha"
    for tensors, said in (
        (pair(value=np.nan), "holds NaN"),
        (pair() | {alpha: np.array(np.inf, np.float32)}, "holds NaN"),
        (pair() | {alpha: np.array(1e300)}, "alpha is a finite number"),
        (pair(rank=0), "rank 0"),
        (pair() | {alpha: np.array([1, 2], np.float32)}, "alpha is one number"),
    ):
        save_file(tensors, path)
        with pytest.raises(InputError, match=said):
            lora.read(path)
    for text in ('{"lora_alpha": "x"}', '{"lora_alpha": [1]}', '{"lora_alpha": 1e999}', "[1]"):
        save_file(pair(), path, {"lora_adapter_metadata": text})
        with pytest.raises(InputError):
            lora.read(path)
    name = "diffusion_model.blocks.%s.self_attn.q.lora_down.weight" % ("9" * 5000)
    save_file({name: np.ones((2, 8), np.float32)}, path)
    with pytest.raises(InputError):
        lora.read(path)


# Headers of safetensors.


def file_of(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape=(1,), place=(0, 4), kind="F32"):
    return {"dtype": kind, "shape": shape, "data_offsets": place}


HEADERS = {
    "overlap": ({"x": entry(), "y": entry()}, "lie in the same place"),
    "part of another": ({"x": entry((2,), (0, 8)), "y": entry((1,), (4, 8))}, "in the same place"),
    "a fraction": ({"x": entry((1.5,), (0, 6))}, "header is wrong"),
    "a truth": ({"x": entry((True,))}, "header is wrong"),
    "a word": ({"x": entry("1")}, "header is wrong"),
    "negative": ({"x": entry((-1,), (4, 0))}, "header is wrong"),
    "beyond": ({"x": entry((1 << 62,), (0, 1 << 64))}, "header is wrong"),
    "axes": ({"x": entry((1,) * 40)}, "40 axes"),
    "no dict": ({"x": [1]}, "header is wrong"),
    "type": ({"x": entry(kind=["F32"])}, "header is wrong"),
    "deep": (b'{"x":' + b"[" * 99999 + b"]" * 99999 + b"}", "deep"),
    "twice": (b'{"x": 1, "x": 1}', '"x" is there twice'),
    "bytes": (b"\xff\xfe", "not in UTF-8"),
    "digits": (b'{"x": ' + b"9" * 9999 + b"}", "no safetensors file"),
}


@pytest.mark.parametrize(("header", "said"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, header, said):
    assert said in refused(file_of(tmp_path / "a.safetensors", header, bytes(8)))


def test_a_length_beyond_the_file_reserves_nothing(tmp_path):
    path = file_of(tmp_path / "a.safetensors", {}, length=99 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "is cut short" in refused(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_named_pipe_is_not_waited_for(tmp_path):
    for name in ("a.safetensors", "a.pt"):
        os.mkfifo(tmp_path / name)
        assert "no ordinary file" in refused(tmp_path / name)


# Documents.


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested more than 64 deep"),
        ('{"a":' * 100 + "1" + "}" * 100, "nested more than 64 deep"),
        ('{"a": NaN}', "NaN is no number"),
        ("-Infinity", "-Infinity is no number"),
        ('{"a": 1, "a": 2}', '"a" is there twice'),
        ("9" * 5000, "cannot be read as JSON"),
        ("", "is not JSON"),
        ("{'a': 1}", "is not JSON"),
        (b"\xff", "not in UTF-8"),
    ],
)
def test_a_document_is_bounded(text, said):
    with pytest.raises(InputError, match=said):
        documents.parse(text, "config.json")


def test_brackets_in_words_are_no_depth(tmp_path):
    value = {"prompt": "[" * 999 + '\\"{', "list": [[1]] * 99}
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps(value), "utf-8")
    assert documents.read(path) == value
    with pytest.raises(InputError, match="more than 9 bytes"):
        documents.read(path, limit=9)
    with pytest.raises(FileNotFoundError):
        documents.read(tmp_path / "b.json")


# Pickles.


def zipped(path, content, storages=(), *, how=zipfile.ZIP_STORED, extra=()):
    """A `.pt` file around the bytes of a pickle."""
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        for key, data in dict(storages).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
        for name in extra:
            archive.writestr(name, b"")
    return path


def text(word):
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def number(n):
    data = n.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(count, kind="FloatStorage", key="0"):
    parts = text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
    return b"(" + parts + number(count) + b"tQ"


def tensor(shape, strides, count, offset=0, **of):
    """Operations that make one."""
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(count, **of) + number(offset)
    return call + numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtR"


def document(*values):
    """A pickle of a dict of these."""
    items = b"".join(text(f"x{i}") + value for i, value in enumerate(values))
    return b"\x80\x02}(" + items + b"u."


def legacy(main, claimed=b""):
    parts = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join(parts) + main + pickle.dumps(["0"], 2) + claimed


def nested(levels, width):
    """Lists of `width` times the list before."""
    ops = b"]q\x00"
    for i in range(levels):
        ops += b"](" + bytes([ord("h"), i]) * width + b"eq" + bytes([i + 1])
    return b"(" + ops + b"t"


PICKLES = {
    "storage": (document(tensor((4,), (1,), 1 << 40)), "claims"),
    "another storage": (document(tensor((1,), (1,), 1, key="7")), "claims"),
    "shape": (document(tensor((1 << 40,), (1,), 4)), "claims more than its 16 bytes"),
    "strides of 0": (document(tensor((1 << 40,), (0,), 4)), "claims more than its 16 bytes"),
    "strides": (document(tensor((2, 2), (1 << 40, 1), 4)), "claims more than its 16 bytes"),
    "offset": (document(tensor((1,), (1,), 4, offset=4)), "claims more than its 16 bytes"),
    "negative": (document(tensor((-1,), (1,), 4)), "no PyTorch checkpoint"),
    "complex": (document(tensor((1,), (1,), 1, kind="ComplexFloatStorage")), "ComplexFloatStorage"),
    "bytearray": (document(b"c__builtin__\nbytearray\n" + number(1 << 40) + b"\x85R"), "nothing"),
    "sparse": (document(b"ctorch._utils\n_rebuild_sparse_tensor\n)R"), "_rebuild_sparse_tensor"),
    "code": (document(b"cposix\nsystem\n" + text("touch ran") + b"\x85R"), "posix.system"),
    "many lists": (document(nested(200, 9)), "too many parts"),
    "a list in itself": (document(b"]q\x00h\x00a"), "too many parts"),
    "keys": (b"\x80\x02}(" + b")q\x00" + b"h\x00h\x00\x86q\x00" * 99 + b"K\x01u.", "no PyTorch"),
    "memory": (b"\x80\x02" + b"\x96" + struct.pack("<Q", 1 << 40) + b".", "no PyTorch"),
    "words": (b"\x80\x02" + b"X" + struct.pack("<I", 1 << 31) + b".", "no PyTorch"),
    "nothing left": (b"\x80\x02a.", "no PyTorch"),
    "no end": (b"\x80\x02}", "no PyTorch"),
    "huge number": (document(b"\x8b" + struct.pack("<i", 999) + b"\x01" * 999), "no PyTorch"),
}


@pytest.mark.parametrize("packed", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(("content", "said"), PICKLES.values(), ids=PICKLES)
def test_a_pickle_that_claims_or_names_too_much_is_refused(
    tmp_path, monkeypatch, content, said, packed
):
    parity.needed("torch")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    if packed:
        zipped(path, content, {"0": bytes(16)})
    else:
        path.write_bytes(legacy(content, struct.pack("<q", 4) + bytes(16)))
    monkeypatch.setattr(source, "_MOST_ENTRIES", 5000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as caught:
        [x for group in open_checkpoint(path).groups.values() for x in group.values()]
    # Without a directory of its storages, an old file is only seen to be too short.
    assert said in str(caught.value) or (not packed and "cut short" in str(caught.value))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
    assert not (tmp_path / "ran").exists()


def test_a_compressed_pickle_is_not_unpacked(tmp_path):
    """16 MB of zeros are 16 kB of it; 6 GB were 3 MB."""
    parity.needed("torch")
    content = document(text("x" * (16 << 20)))
    path = zipped(tmp_path / "a.pt", content, how=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 18
    assert "is compressed" in refused(path)


def test_pickles_have_a_largest_size(tmp_path, monkeypatch):
    parity.needed("torch")
    path = zipped(tmp_path / "a.pt", document(b"K\x01"))
    assert "holds no tensors" in refused(path)
    monkeypatch.setattr(pickles, "LARGEST", 9)
    assert "has more than 0 MB" in refused(path)
    monkeypatch.undo()
    monkeypatch.setattr(pickles, "MOST", 3)
    assert "too many parts" in refused(path)


def test_what_training_saves_is_read(tmp_path):
    """Optimisers, schedulers and generators of random numbers: their pickles are ordinary ones."""
    torch = parity.needed("torch")
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    content = {
        "model": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict(),
        "generator": {"shared": (x := torch.arange(6.0)), "view": x[2:4], "turned": x.view(2, 3).T},
        "rng": torch.get_rng_state(),
        "size": torch.Size([2]),
        "raw": b"bytes",
        "empty": torch.zeros(0, 4),
        "half": torch.ones(3, dtype=torch.float16),
        "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "flag": True,
        "order": collections.OrderedDict(a=1),
    }
    for new in (True, False):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        groups = open_checkpoint(tmp_path / "a.pt").groups
        assert groups["generator"]["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
        assert groups["generator"]["view"].tolist() == [2, 3]
        np.testing.assert_array_equal(groups["model"]["weight"], layer.weight.detach().numpy())


def test_the_code_of_a_pickle_is_not_looked_up(tmp_path):
    """Names stay names, so that not even an import is run."""
    path = tmp_path / "a.pt"
    zipped(path, document(b"cthis_module_is_not_there\nname\n"))
    pickles.check(path)
    with pytest.raises(pickle.UnpicklingError, match="GLOBAL this_module_is_not_there.name"):
        zipped(path, document(b"cthis_module_is_not_there\nname\n)R"))
        pickles.check(path)


def test_pieces_of_a_file_are_no_checkpoint(tmp_path):
    parity.needed("torch")
    whole = io.BytesIO()
    zipped(whole, document(tensor((4,), (1,), 4)), {"0": bytes(16)})
    path = tmp_path / "a.pt"
    path.write_bytes(whole.getvalue())
    assert open_checkpoint(path).groups[""]["x0"].tolist() == [0, 0, 0, 0]
    for kept in range(0, len(whole.getvalue()) - 1, 37):
        path.write_bytes(whole.getvalue()[:kept])
        assert "is cut short" in refused(path)
