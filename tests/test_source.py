"""Checkpoint files: read tensor by tensor, and refused in one sentence where they are broken."""

import io
import json
import os
import pathlib
import sys

import ml_dtypes
import numpy as np
import parity
import pytest
from safetensors.numpy import save_file

from longlive_jax.convert.source import open_checkpoint, spec_of
from longlive_jax.errors import InputError

RNG = np.random.default_rng(0)
WIDE = {
    "f32": RNG.normal(size=(3, 5)).astype(np.float32),
    "f16": RNG.normal(size=7).astype(np.float16),
    "u8": RNG.integers(0, 255, (3, 3), np.uint8),
    "i32": np.arange(4, dtype=np.int32),
    "flags": np.array([True, False, True]),
    "number": np.array(2.5, np.float64),
    "nothing": np.zeros((0, 4), np.float32),
}


def same(ours, expected):
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    np.testing.assert_array_equal(ours.reshape(-1).view(np.uint8), expected.reshape(-1).view("u1"))


def refused(path):
    """What is said of a file that cannot be used: one line."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_safetensors_are_read_as_they_are(tmp_path):
    save_file(WIDE, tmp_path / "a.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    tensors = checkpoint.groups[""]
    assert checkpoint.facts == {"format": "pt"}
    assert set(tensors) == set(WIDE) and len(tensors) == len(WIDE)
    for name, expected in WIDE.items():
        same(tensors[name], expected)
        assert tensors.spec(name).shape == expected.shape
        assert tensors.spec(name).dtype == expected.dtype


def test_renamed_tensors_are_the_ones_asked_for(tmp_path):
    save_file(WIDE, tmp_path / "a.safetensors")
    renamed = open_checkpoint(tmp_path / "a.safetensors").groups[""].renamed({"new": "f32"})
    assert list(renamed) == ["new"] and "f32" not in renamed
    same(renamed["new"], WIDE["f32"])
    assert spec_of(renamed, "new").shape == spec_of({"new": WIDE["f32"]}, "new").shape == (3, 5)


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_tensor_is_let_go_with_its_array(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(WIDE, path)
    tensors = open_checkpoint(path).groups[""]

    def mapped():
        return str(path) in pathlib.Path("/proc/self/maps").read_text()

    assert not mapped()
    array = tensors["f32"]
    assert mapped()
    del array
    assert not mapped()


def shards(folder, count=3, *, index):
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for i, name in enumerate(names):
        save_file({f"layer.{i}": np.full(4, i, np.float32)}, folder / name)
    if index:
        places = {f"layer.{i}": name for i, name in enumerate(names)}
        text = json.dumps({"metadata": {}, "weight_map": places})
        (folder / "model.safetensors.index.json").write_text(text)
    return names


@pytest.mark.parametrize("index", [True, False], ids=["index", "names"])
def test_a_folder_of_shards_is_one_checkpoint(tmp_path, index):
    names = shards(tmp_path, index=index)
    tensors = open_checkpoint(tmp_path).groups[""]
    assert sorted(tensors) == ["layer.0", "layer.1", "layer.2"]
    assert tensors["layer.2"].tolist() == [2.0] * 4
    (tmp_path / names[1]).unlink()
    assert f"lacks the shard {names[1]}" in refused(tmp_path)


def test_a_folder_that_says_two_things_is_refused(tmp_path):
    names = shards(tmp_path, index=True)
    save_file({"other": np.zeros(2)}, tmp_path / names[0])
    assert "disagree" in refused(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({"other": np.zeros(2)}, tmp_path / "z.safetensors")
    assert "repeats other" in refused(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 40, -1], ids=["nothing", "length", "header", "data"])
def test_a_shard_that_is_cut_short_is_refused(tmp_path, kept):
    path = tmp_path / "a.safetensors"
    save_file(WIDE, path)
    path.write_bytes(path.read_bytes()[:kept])
    assert "is cut short" in refused(path)


def header(text):
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "no safetensors file"),
        (header(b"[1]"), "no safetensors file"),
        (header(b'{"x": {"shape": [1]}}'), "no safetensors file"),
        (header(b'{"x": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}'), "F3"),
        (header(b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}'), "wrong place"),
    ],
    ids=["pointer", "page", "list", "fields", "type", "offsets"],
)
def test_a_file_that_is_something_else_is_refused(tmp_path, content, said):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert said in refused(path)


def test_paths_without_a_checkpoint_are_refused(tmp_path):
    assert "there is no" in refused(tmp_path / "a.safetensors")
    assert "holds no safetensors" in refused(tmp_path)
    (tmp_path / "a.txt").write_text("")
    assert "its name should end in" in refused(tmp_path / "a.txt")


def test_pytorch_files_keep_their_types_and_groups(tmp_path):
    torch = parity.needed("torch")
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    content = {
        "generator": {
            "model.blocks.0.weight": values.to(torch.bfloat16).T,
            "model.blocks.0.scale": values.to(torch.float8_e4m3fn),
            "plain": torch.nn.Parameter(values),
        },
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "lr": 0.5},
        "checkpoint_format": "merged",
        "step": torch.tensor(700),
    }
    torch.save(content, tmp_path / "a.pt")
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert checkpoint.facts == {"checkpoint_format": "merged", "step": 700, "optimizer.lr": 0.5}
    assert set(checkpoint.groups) == {"generator", "optimizer"}
    assert list(checkpoint.groups["optimizer"]) == ["state.0.exp_avg"]
    tensors, plain = checkpoint.groups["generator"], values.numpy()
    same(tensors["plain"], plain)
    same(tensors["model.blocks.0.weight"], plain.astype(ml_dtypes.bfloat16).T)
    same(tensors["model.blocks.0.scale"], plain.astype(ml_dtypes.float8_e4m3fn))
    assert tensors.spec("model.blocks.0.weight").shape == (6, 4)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_bare_state_dict_is_the_group_without_a_name(tmp_path, zipped):
    torch = parity.needed("torch")
    path = tmp_path / "a.pth"
    state = {"x.weight": torch.ones(64, 64), "x.alpha": torch.tensor(2.0)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.groups) == {""} and not checkpoint.facts
    assert set(checkpoint.groups[""]) == {"x.weight", "x.alpha"}
    path.write_bytes(path.read_bytes()[:-1000])
    assert "is cut short" in refused(path)


class Code:
    """Unpickled, it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, zipped):
    torch = parity.needed("torch")
    content = {"generator": {"x": torch.ones(2)}, "extra": Code(tmp_path / "ran")}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert "nothing of it was run" in refused(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_the_state_of_transformer_engine_is_refused_with_advice(tmp_path):
    torch = parity.needed("torch")
    tensors = {"x.weight": torch.ones(2), "x._extra_state": io.BytesIO(b"scales")}
    torch.save({"generator": tensors}, tmp_path / "a.pt")
    said = refused(tmp_path / "a.pt")
    assert "nothing of it was run" in said and "convert the merged bf16 file" in said
    torch.save({"x": torch.ones(2), "code": Code(tmp_path)}, tmp_path / "a.pt")
    assert "TransformerEngine" not in refused(tmp_path / "a.pt")


def test_pytorch_files_without_a_state_dict_are_refused(tmp_path):
    torch = parity.needed("torch")
    torch.save([torch.ones(2)], tmp_path / "a.pt")
    assert "no dict of tensors but a list" in refused(tmp_path / "a.pt")
    torch.save({"step": 3}, tmp_path / "a.pt")
    assert "holds no tensors" in refused(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(b"no checkpoint at all")
    assert "is cut short, or no PyTorch checkpoint" in refused(tmp_path / "a.pt")


def test_without_pytorch_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pt").write_bytes(b"PK")
    assert 'pip install "longlive-jax[torch]"' in refused(tmp_path / "a.pt")
