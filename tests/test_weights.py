"""Weights in files: written piece by piece, whole or not at all, and put straight on devices."""

import dataclasses
import errno
import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import longlive_jax
from longlive_jax import config, weights
from longlive_jax import lora as loras
from longlive_jax.config import SHIPPED
from longlive_jax.convert import table
from longlive_jax.convert.source import Stored, Tensors, open_checkpoint
from longlive_jax.convert.table import LINEAR, NameMismatch, Pending, Row
from longlive_jax.errors import InputError
from longlive_jax.vae.vae import VAE

LAYERS, WIDTH = 8, 512  # a megabyte of float32 a layer
ROWS = [
    Row("blocks.{i}.weight", "blocks.kernel", LINEAR),
    Row("blocks.{i}.bias", "blocks.bias"),
    Row("head", "head", squeeze=(0,)),
]


class Blocks(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.zeros((LAYERS, WIDTH, WIDTH)))
        self.bias = nnx.Param(jnp.zeros((LAYERS, WIDTH)))


class Net(nnx.Module):
    def __init__(self):
        self.blocks = Blocks()
        self.head = nnx.Param(jnp.zeros((2, WIDTH)))


@pytest.fixture(scope="module")
def abstract():
    return nnx.eval_shape(Net)


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(0)
    made = {"head": rng.normal(size=(1, 2, WIDTH)).astype(np.float32)}
    for i in range(LAYERS):
        made[f"blocks.{i}.weight"] = rng.normal(size=(WIDTH, WIDTH)).astype(np.float32)
        made[f"blocks.{i}.bias"] = rng.normal(size=WIDTH).astype(np.float32)
    return made


def same(ours, expected):
    assert set(ours) == set(expected)
    for name in expected:
        assert ours[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(ours[name], expected[name])


def unread(tensors):
    """Tensors that know their shapes, and fail when they are read."""

    def fail():
        raise AssertionError("a tensor was read")

    return Tensors({name: Stored(x.shape, x.dtype, fail) for name, x in tensors.items()})


def test_there_and_back_is_bit_exact(tmp_path, abstract, tensors):
    plan = table.plan(abstract, ROWS, tensors)
    weights.write(tmp_path, "dit", plan)
    back = table.export_pending(weights.read(tmp_path, "dit"), ROWS)
    assert {name: part.shape for name, part in back.items()} == {
        name: x.shape for name, x in tensors.items()
    }
    weights.write(tmp_path / "out", "model", back, shard_bytes=3 << 20, metadata={"format": "pt"})
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files[:-1] == [f"model-{i:05d}-of-00003.safetensors" for i in range(1, 4)]
    assert files[-1] == "model.safetensors.index.json"
    assert max(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 3.01 * 2**20
    listing = json.loads((tmp_path / "out" / files[-1]).read_text())
    assert listing["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert set(listing["weight_map"]) == set(tensors)
    theirs = {}
    for name in files[:-1]:
        theirs |= load_file(tmp_path / "out" / name)
    same(theirs, tensors)
    same(weights.read(tmp_path / "out", "model"), tensors)


def test_a_filled_module_is_what_the_written_files_hold(tmp_path, abstract, tensors):
    weights.write(tmp_path, "dit", table.plan(abstract, ROWS, tensors))
    filled = weights.flatten(table.fill(abstract, ROWS, tensors))
    same(weights.read(tmp_path, "dit"), filled)
    same(table.export(table.fill(abstract, ROWS, tensors), ROWS), tensors)


def test_types_are_kept_or_cast_and_mixed_layers_are_widened(tmp_path, abstract, tensors):
    mixed = {
        name: x.astype(ml_dtypes.bfloat16) if name != "blocks.3.bias" else x
        for name, x in tensors.items()
    }
    plan = table.plan(abstract, ROWS, mixed)
    assert plan["blocks.bias"].dtype == np.float32 and plan["head"].dtype == ml_dtypes.bfloat16
    plan["codes"] = next(iter(table.unchanged({"codes": np.arange(5, dtype=np.uint8)}).values()))
    weights.write(tmp_path, "dit", plan, dtype=jnp.bfloat16)
    read = weights.read(tmp_path, "dit")
    assert {name: str(read[name].dtype) for name in read} == {
        "blocks.kernel": "bfloat16",
        "blocks.bias": "bfloat16",
        "head": "bfloat16",
        "codes": "uint8",
    }
    expected = np.stack([mixed[f"blocks.{i}.weight"].T for i in range(LAYERS)])
    np.testing.assert_array_equal(read["blocks.kernel"], expected)
    np.testing.assert_array_equal(read["codes"], np.arange(5))


def test_one_tensor_is_in_memory_at_a_time(tmp_path, abstract, tensors):
    names, count = sorted(tensors), 3
    for shard in range(count):
        part = {name: tensors[name] for name in names[shard::count]}
        save_file(part, tmp_path / f"model-{shard + 1:05d}-of-{count:05d}.safetensors")
    largest = max(path.stat().st_size for path in tmp_path.iterdir())
    tracemalloc.start()
    try:
        plan = table.plan(abstract, ROWS, open_checkpoint(tmp_path).groups[""])
        weights.write(tmp_path / "ours", "dit", plan, shard_bytes=4 << 20)
        back = table.export_pending(weights.read(tmp_path / "ours", "dit"), ROWS)
        weights.write(tmp_path / "theirs", "model", back, shard_bytes=4 << 20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * largest
    assert peak < 2.5 * max(x.nbytes for x in tensors.values())
    same(weights.read(tmp_path / "theirs", "model"), tensors)


def test_a_mismatch_names_everything_and_reads_nothing(abstract, tensors):
    wrong = {name: x for name, x in tensors.items() if name != "blocks.1.bias"}
    wrong |= {"extra": tensors["head"], "blocks.5.weight": tensors["head"]}
    with pytest.raises(NameMismatch) as caught:
        table.plan(abstract, ROWS, unread(wrong))
    assert caught.value.missing == ("blocks.1.bias",)
    assert caught.value.unexpected == ("extra",)
    assert caught.value.shapes == (f"blocks.5.weight (1, 2, {WIDTH}) and not ({WIDTH}, {WIDTH})",)
    assert "missing: blocks.1.bias; unexpected: extra; of another shape" in str(caught.value)
    table.plan(abstract, ROWS, unread(tensors))
    with pytest.raises(NameMismatch, match="not in the table: head"):
        table.plan(abstract, ROWS[:2], {k: x for k, x in tensors.items() if k != "head"})
    with pytest.raises(NameMismatch, match="missing: head; unexpected: tail"):
        flat = weights.flatten(abstract)
        table.export_pending({**{k: flat[k] for k in flat if k != "head"}, "tail": 0}, ROWS)


def test_what_may_be_missing_is_zero(abstract, tensors):
    some = {name: x for name, x in tensors.items() if name not in ("blocks.1.bias", "head")}
    plan = table.plan(abstract, ROWS, some, allow_missing=["blocks.*.bias", "head"])
    assert not plan["head"].array().any()
    bias = plan["blocks.bias"].array()
    assert not bias[1].any()
    np.testing.assert_array_equal(bias[2], tensors["blocks.2.bias"])
    with pytest.raises(NameMismatch, match="missing: head"):
        table.plan(abstract, ROWS, some, allow_missing=["blocks.*.bias"])


def test_a_table_that_repeats_itself_is_refused(abstract, tensors):
    with pytest.raises(ValueError, match="more than one row for head"):
        table.plan(abstract, [*ROWS, ROWS[-1]], tensors)


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("there", [True, False], ids=["over", "new"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, abstract, tensors, there):
    folder = tmp_path / "new" / "model"
    if there:
        weights.write(folder, "dit", table.unchanged({"old": np.ones(3)}))
    before = listing(folder) if there else None
    put, calls = weights._put, []

    def full(file, data):
        calls.append(file.name)
        if len(calls) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(file, data)

    monkeypatch.setattr(weights, "_put", full)
    plan = table.plan(abstract, ROWS, tensors)
    with pytest.raises(InputError, match="no space left in .*: nothing was written"):
        weights.write(folder, "dit", plan, shard_bytes=1 << 20)
    assert len(set(calls)) > 1 or len(calls) == 8
    assert (listing(folder) if there else None) == before
    assert there or not any(tmp_path.iterdir())


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="no space left"):
        weights.write(tmp_path / "model", "dit", table.unchanged({"x": np.ones(3)}))
    assert not any(tmp_path.iterdir())


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "model").write_text("here first")
    with pytest.raises(InputError, match="cannot write to"):
        weights.write(tmp_path / "model", "dit", table.unchanged({"x": np.ones(3)}))
    assert (tmp_path / "model").read_text() == "here first"


def test_a_tensor_that_fails_half_way_leaves_nothing(tmp_path):
    def pieces():
        yield np.ones((1, 4), np.float32)
        raise RuntimeError("gone")

    pending = {"a": Pending((2, 4), np.dtype(np.float32), pieces)}
    with pytest.raises(RuntimeError, match="gone"):
        weights.write(tmp_path / "model", "dit", pending)
    short = Pending((2, 4), np.dtype(np.float32), lambda: iter([np.ones((1, 4), np.float32)]))
    with pytest.raises(ValueError, match="a has 16 bytes"):
        weights.write(tmp_path / "model", "dit", {"a": short})
    assert not any(tmp_path.iterdir())


def test_a_part_takes_the_place_of_what_it_was(tmp_path):
    many = table.unchanged({name: np.full(4, i) for i, name in enumerate("abc")})
    weights.write(tmp_path, "vae_light", many, shard_bytes=32)
    others = set(listing(tmp_path))
    assert len(others) == 4
    weights.write(tmp_path, "vae", many, shard_bytes=32)
    weights.write(tmp_path, "vae", table.unchanged({"d": np.ones(2)}))
    assert set(listing(tmp_path)) == others | {"vae.safetensors"}
    assert list(weights.read(tmp_path, "vae")) == ["d"]
    weights.write(tmp_path, "vae", many, shard_bytes=32)
    assert not (tmp_path / "vae.safetensors").exists()
    assert sorted(weights.read(tmp_path, "vae")) == ["a", "b", "c"]


def test_flat_weights_go_through_one_file(tmp_path):
    flat = {"a.kernel": jnp.arange(6.0).reshape(2, 3), "a.bias": jnp.ones(3)}
    weights.save(tmp_path / "new" / "a.safetensors", flat, jnp.bfloat16)
    assert load_as_numpy(tmp_path / "new" / "a.safetensors") == {"a.kernel", "a.bias"}
    same(weights.load(tmp_path / "new" / "a.safetensors"), flat)
    half = weights.load(tmp_path / "new" / "a.safetensors", jnp.bfloat16)
    assert {x.dtype for x in half.values()} == {np.dtype(jnp.bfloat16)}


def load_as_numpy(path):
    return set(open_checkpoint(path).groups[""])


# Whole models.


def test_parameters_go_to_the_shardings_asked_for():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    asked = []

    def sharding(part, path, shape):
        asked.append((part, path))
        cut = part == "dit" and path.endswith("kernel") and shape[-1] % 8 == 0
        axes = [None] * (len(shape) - 1) + ["d"] if cut else []
        return NamedSharding(mesh, PartitionSpec(*axes))

    spread = longlive_jax.load("tiny", sharding=sharding)
    plain = longlive_jax.load("tiny")
    assert {part for part, _ in asked} == {"dit", "text", "vae"}
    for ours, theirs in [(spread.dit, plain.dit), (spread.vae, plain.vae)]:
        ours, theirs = weights.flatten(ours), weights.flatten(theirs)
        assert all(len(x.sharding.device_set) == 8 for x in ours.values())
        assert all(len(x.sharding.device_set) == 1 for x in theirs.values())
        same(ours, theirs)
    q = weights.flatten(spread.dit)["blocks.self_attn.q.kernel"]
    assert q.addressable_shards[0].data.shape == (*q.shape[:-1], q.shape[-1] // 8)


def test_the_type_of_the_weights_can_be_chosen():
    assert {x.dtype for x in jax.tree.leaves(longlive_jax.load("tiny").dit)} == {np.dtype("f4")}
    model = longlive_jax.load("tiny", dtype=jnp.bfloat16)
    for module in (model.dit, model.vae, model.text.umt5):
        assert {x.dtype for x in weights.flatten(module).values()} == {np.dtype(jnp.bfloat16)}


@pytest.fixture
def tiny(tmp_path):
    """A copy of the shipped model, to take apart."""
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED / "tiny", folder)
    return folder


def test_missing_parts_are_named_with_the_way_to_add_them(tiny):
    for name in ("text.safetensors", "vae.safetensors", "tokenizer.json"):
        (tiny / name).unlink()
    lacks = "lacks its text encoder and its VAE and its tokenizer: .*longlive convert --from"
    with pytest.raises(InputError, match=lacks):
        longlive_jax.load(tiny)
    (tiny / "config.json").write_text("{}")
    with pytest.raises(InputError, match="is no model's config: it has no"):
        longlive_jax.load(tiny)
    with pytest.raises(InputError, match="config.json is missing"):
        longlive_jax.load(tiny / "nowhere")


def test_a_broken_part_is_one_sentence(tiny):
    whole = (tiny / "dit.safetensors").read_bytes()
    (tiny / "dit.safetensors").write_bytes(whole[:-5])
    with pytest.raises(InputError, match="dit.safetensors.* is cut short"):
        longlive_jax.load(tiny)
    save_file({"x": np.zeros(2)}, tiny / "dit.safetensors")
    with pytest.raises(InputError, match="does not fit its config.json: dit: missing: "):
        longlive_jax.load(tiny)


def test_another_decoder_is_taken_by_its_name(tiny):
    with pytest.raises(InputError, match='no VAE "light", only full'):
        longlive_jax.load(tiny, vae="light")
    cfg = config.from_json(json.loads((tiny / "config.json").read_text()))
    light = dataclasses.replace(cfg.vae, encoder_dim=8, decoder_dim=8)
    cfg = dataclasses.replace(cfg, decoders=(("light", light),))
    (tiny / "config.json").write_text(json.dumps(config.to_json(cfg)))
    with pytest.raises(InputError, match="lacks its light VAE"):
        longlive_jax.load(tiny, vae="light")
    weights.save(tiny / "vae_light.safetensors", weights.flatten(VAE(light, rngs=nnx.Rngs(0))))
    assert longlive_jax.load(tiny, vae="light").vae.cfg == light
    assert longlive_jax.load(tiny).vae.cfg == cfg.vae


def test_a_lora_is_applied_unmerged_the_one_asked_for_before_the_folders(tiny, tmp_path):
    dit = longlive_jax.load(tiny).dit
    for rank, path in [(2, tiny / "lora.safetensors"), (3, tmp_path / "other.safetensors")]:
        loras.save(path, loras.init(dit, rank, jax.random.key(rank)))

    def rank(model):
        return weights.flatten(model.dit)["blocks.self_attn.q.kernel"].a.shape[-2]

    assert rank(longlive_jax.load(tiny)) == 2
    assert rank(longlive_jax.load(tiny, lora=tmp_path / "other.safetensors")) == 3
