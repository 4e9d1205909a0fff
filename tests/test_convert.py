"""Published files in and out: every name, every family, round trips, and what is refused."""

import dataclasses
import errno
import gzip
import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import small_wan
import torch
import wan
from safetensors.numpy import save_file
from test_dit import run as forward

import longlive_jax
from longlive_jax import cli, config, weights
from longlive_jax.convert import family, nvfp4, run, table, wan_dit, wan_vae
from longlive_jax.convert.source import Stored, Tensors
from longlive_jax.dit import mask
from longlive_jax.errors import InputError
from longlive_jax.model import SHIPPED

NAMES = json.loads(gzip.decompress((wan.GOLDEN / "names.json.gz").read_bytes()))
FULL = {
    "wan21_t2v_1_3b": ("dit", config.WAN21_T2V_1_3B.dit),
    "wan21_t2v_14b": ("dit", config.WAN21_T2V_14B.dit),
    "wan22_ti2v_5b": ("dit", config.WAN22_TI2V_5B.dit),
    "vae_2_1": ("vae", config.WAN21_VAE),
    "vae_2_2": ("vae", config.WAN22_VAE),
    "umt5_xxl": ("text", config.UMT5_XXL),
    "lightvae_0.5": ("vae_light", None),
    "lightvae_0.75": ("vae_light", None),
}

DIT_K = config.DiTConfig(
    dim=64, ffn_dim=128, heads=2, layers=2, channels=4, text_dim=24, text_len=14, freq_dim=32
)


@pytest.mark.parametrize("name", FULL)
def test_full_size_names_and_shapes(name):
    """Nothing is allocated: a plan reads names and shapes, and is strict about both."""
    kind, cfg = FULL[name]
    shapes = {key: tuple(shape) for key, shape in NAMES["shapes"][name].items()}
    half = np.dtype(jnp.bfloat16)
    tensors = Tensors({key: Stored(shape, half, _never) for key, shape in shapes.items()})
    part = family.Part(kind, "wan", tensors, {}, pathlib.Path(name))
    found = part.config()
    assert cfg is None or found == cfg
    planned = table.plan(run.abstract(kind, found), part.rows(found), part.tensors)
    assert sum(math.prod(x.shape) for x in planned.values()) == sum(map(math.prod, shapes.values()))


def _never():
    raise AssertionError("a tensor was read")


@pytest.mark.parametrize(
    ("name", "tables", "cfg"),
    [
        ("dit", wan_dit, config.WAN21_T2V_1_3B.dit),
        ("vae_2_1", wan_vae, config.WAN21_VAE),
        ("vae_2_2", wan_vae, config.WAN22_VAE),
    ],
)
def test_diffusers_names(name, tables, cfg):
    found = {}
    for ours, theirs in zip(tables.rows(cfg), tables.rows_diffusers(cfg), strict=True):
        layers = range(cfg.layers if ours.stacked else 1)
        found |= {ours.source.format(i=i): theirs.source.format(i=i) for i in layers}
    assert found == NAMES["diffusers"][name]


def test_the_published_presets_are_recognised():
    for preset in run.PRESETS:
        parts = {"dit": preset.dit, "vae": preset.vae, "text": preset.text}
        assert run.assemble([], parts) == preset
        assert run.assemble([], {"dit": preset.dit}) == preset
    assert run.assemble([], {"vae": config.WAN22_VAE}) == config.WAN22_TI2V_5B


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_K_wan_transformer(golden, facts, layout, tmp_path):
    case = golden("longlive1", "K_wan_transformer")
    official = wan.weights(golden("longlive1", "A_train_forward"))
    said = facts("longlive1", "K_wan_transformer")
    rename = {}
    for ours, theirs in zip(wan_dit.rows(DIT_K), wan_dit.rows_diffusers(DIT_K), strict=True):
        rename |= dict(zip(ours.names((2,)), theirs.names((2,)), strict=True))
    folder = tmp_path / "transformer"
    folder.mkdir()
    names = rename if layout == "diffusers" else {name: name for name in official}
    save_file({names[k]: v for k, v in official.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_heads": 2, "text_len": 14}))
    run.convert([folder], tmp_path / "ours")
    cfg = config.from_json(json.loads((tmp_path / "ours" / "config.json").read_text()))
    assert cfg.dit == DIT_K
    dit = weights.place(
        run.abstract("dit", cfg.dit), weights.read(tmp_path / "ours", "dit"), dtype=jnp.float32
    )
    x = wan.channel_last(case["in/x"])
    text = wan.prompts(dit, case["in/context"], 2)
    out = forward(dit, x, case["in/t"][:, None], text, mask.table(mask.clean(3, 3)))
    for name in ("out/official", "out/diffusers"):
        atol = said["tolerance"][name]["atol"]
        np.testing.assert_allclose(wan.channel_first(out), case[name], rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["11_nvfp4_static_4", "11_nvfp4_static_6", "11_nvfp4_mse"])
@pytest.mark.parametrize("kind", ["normal_fp32_1d", "heavy_fp32_2d"])
def test_nvfp4_dequantised(golden, name, kind):
    case = golden("longlive2", name)
    packed, scales, amax, want = (
        case[f"out/{kind}/{key}"] for key in ("packed", "scales_blocked", "amax", "dequant")
    )
    got = nvfp4.unpack(packed, scales, amax, np.array([128, 128, 128, 128]))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=0)


def test_nvfp4_file_reads_as_plain_weights(golden):
    case = golden("longlive2", "11_nvfp4_mse")
    start = "model.blocks.0.ffn.0.quantized_weight_"
    packed = {
        f"{start}values": case["out/normal_fp32_1d/packed"],
        f"{start}scale_factors": case["out/normal_fp32_1d/scales_blocked"],
        f"{start}amax": case["out/normal_fp32_1d/amax"],
        f"{start}metadata": np.array([128, 128, 128, 128], np.int32),
        "model.blocks.0.ffn.0.bias": np.ones(128, np.float32),
    }
    assert nvfp4.is_packed(packed)
    got = nvfp4.unpacked(packed, np.float32)
    assert set(got) == {"model.blocks.0.ffn.0.weight", "model.blocks.0.ffn.0.bias"}
    assert got.spec("model.blocks.0.ffn.0.weight").shape == (128, 128)
    np.testing.assert_allclose(
        got["model.blocks.0.ffn.0.weight"], case["out/normal_fp32_1d/dequant"], rtol=1e-6
    )


def test_a_folder_with_only_some_parts(tmp_path):
    (tmp_path / "in" / "vae").mkdir(parents=True)
    names = small_wan.tensors("vae", "diffusers")
    save_file(names, tmp_path / "in" / "vae" / "diffusion_pytorch_model.safetensors")
    run.convert([tmp_path / "in"], tmp_path / "ours")
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {"config.json", "vae.safetensors"}
    cfg = config.from_json(json.loads((tmp_path / "ours" / "config.json").read_text()))
    assert cfg.vae == small_wan.VAE21
    assert cfg.stream == config.WAN21_T2V_1_3B.stream


def test_missing_is_zero_only_when_asked_for(tmp_path):
    source = small_wan.write(tmp_path / "in")
    names = small_wan.tensors("dit")
    del names["blocks.1.norm3.bias"]
    save_file(names, source / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=r"missing: blocks.1.norm3.bias; --allow-missing"):
        run.convert([source], tmp_path / "ours")
    run.convert([source], tmp_path / "ours", allow_missing=True)
    cfg = config.from_json(json.loads((tmp_path / "ours" / "config.json").read_text()))
    assert cfg.allowed_missing == ("dit: blocks.1.norm3.bias",)
    bias = weights.read(tmp_path / "ours", "dit")["blocks.norm.bias"]
    assert not bias[1].any() and bias[0].any()


def _other_size(folder):
    cfg = dataclasses.replace(small_wan.DIT, ffn_dim=64)
    (folder / "two").mkdir()
    path = folder / "two" / "generator.safetensors"
    save_file({f"model.{k}": v for k, v in small_wan.tensors("dit", cfg=cfg).items()}, path)
    return [folder, path]


def _truncated(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return [folder]


def _promised(folder):
    said = {"transformer": ["diffusers", "X"], "vae": ["diffusers", "Y"]}
    (folder / "model_index.json").write_text(json.dumps(said))
    (folder / "transformer").mkdir()
    return [folder]


def _unexpected(folder):
    more = {"img_emb.proj.0.weight": np.zeros(3, np.float32)}
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file(small_wan.tensors("dit") | more, path)
    return [folder]


def _lora(path, width=8):
    place = "base_model.model.blocks.{}.self_attn.q.lora_{}.weight"
    shapes = {"A": (4, width), "B": (width, 4)}
    halves = ((i, side) for i in range(small_wan.DIT.layers) for side in "AB")
    save_file({place.format(*half): np.ones(shapes[half[1]], np.float32) for half in halves}, path)


def _other_lora(folder):
    (folder / "two").mkdir()
    _lora(folder / "two" / "lora.safetensors")
    return [folder, folder / "two" / "lora.safetensors"]


def _lora_among_shards(folder):
    _lora(folder / "lora.safetensors")
    return [folder]


def _code(folder):
    path = folder / "generator.pt"
    torch.save({"generator": {"x": torch.zeros(1)}, "args": pathlib.PurePosixPath("/")}, path)
    return [path]


def _engine(folder):
    path = folder / "generator.pt"
    said = "longlive_generator_te_nvfp4"
    torch.save({"generator": {"x": torch.zeros(1)}, "checkpoint_format": said}, path)
    return [path]


def _two_transformers(folder):
    (folder / "high_noise_model").mkdir()
    return [folder]


def _average_only(folder):
    path = folder / "generator.pt"
    torch.save({"generator_ema": {"x": torch.zeros(1)}}, path)
    return [path]


def _nothing(folder):
    (folder / "empty").mkdir()
    return [folder / "empty"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_other_size, "two families are mixed"),
        (_truncated, "cut short"),
        (_promised, "promises vae"),
        (_unexpected, "unexpected: img_emb.proj.0.weight"),
        (_other_lora, "blocks.self_attn.q"),
        (_lora_among_shards, "mixes a LoRA with other tensors"),
        (_code, "nothing of it was run"),
        (_engine, "TransformerEngine"),
        (_two_transformers, "has two transformers"),
        (_average_only, "say --ema"),
        (_nothing, "holds nothing that is known"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, capsys, spoil, message):
    paths = spoil(small_wan.write(tmp_path / "in"))
    flags = [word for path in paths for word in ("--from", str(path))]
    assert cli.run(["convert", *flags, "--to", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_two_families_mixed_by_their_latents(tmp_path):
    source = small_wan.write(tmp_path / "in")
    (source / "vae").mkdir()
    wide = small_wan.tensors("vae", "diffusers", cfg=small_wan.VAE22)
    save_file(wide, source / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match="two families are mixed: .* 16 and 8 latent channels"):
        run.convert([source / "diffusion_pytorch_model.safetensors", source / "vae"], source / "o")


def test_a_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
    source, written = small_wan.write(tmp_path / "in"), []

    def put(file, data):
        written.append(len(data))
        if sum(written) > 50_000:
            raise OSError(errno.ENOSPC, "no space left on device")
        file.write(memoryview(data))

    monkeypatch.setattr(weights, "_put", put)
    assert cli.run(["convert", "--from", str(source), "--to", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "no space left" in said and said.count("\n") == 1
    assert len(written) > 2
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_a_faster_decoder_is_added_and_used(tmp_path):
    """TAEHV beside the tiny model's own VAE: both speak 16 channels, of 8×8 pixels and 4 frames."""
    tae = config.TAEConfig(latent_channels=16, encoder_dim=4, decoder_dims=(8, 6, 4, 4))
    file, model = tmp_path / "taew2_1.safetensors", tmp_path / "model"
    save_file(small_wan.tensors("vae_tae", cfg=tae), file)
    sources = ["--from", str(SHIPPED / "tiny"), "--from", str(file)]
    assert cli.run(["convert", *sources, "--to", str(model)]) == 0
    made = config.from_json(json.loads((model / "config.json").read_text()))
    assert made.decoders == (("tae", tae),) and made.vae == config.TINY.vae

    def frames(vae):
        loaded = longlive_jax.load(str(model), vae=vae)
        return next(iter(loaded.stream("a red circle moves left over a black background"))).frames

    full, fast = frames("full"), frames("tae")
    assert full.shape == fast.shape == (9, 64, 64, 3)
    assert (full != fast).any()


@pytest.mark.parametrize("layout", ["pytorch", "diffusers"])
def test_a_whole_folder_goes_out_and_comes_back(tmp_path, layout):
    """Transformer, LoRA and both fast decoders: nothing is lost on the way."""
    source, files = small_wan.write(tmp_path / "in"), tmp_path / "files"
    files.mkdir()
    _lora(files / "lora.safetensors", small_wan.DIT.dim)
    tae = config.TAEConfig(latent_channels=16, encoder_dim=4, decoder_dims=(8, 6, 4, 4))
    light = dataclasses.replace(small_wan.VAE22, latent_channels=16)
    save_file(small_wan.tensors("vae_tae", cfg=tae), files / "taew2_1.safetensors")
    save_file(small_wan.tensors("vae_light", "diffusers", cfg=light), files / "light.safetensors")
    run.convert([source, *sorted(files.iterdir())], tmp_path / "ours")
    run.convert([tmp_path / "ours"], tmp_path / "out", layout=layout)
    run.convert([tmp_path / "out"], tmp_path / "back")
    ours, back = ({p.name for p in (tmp_path / name).iterdir()} for name in ("ours", "back"))
    parts = ("dit", "vae_tae", "vae_light", "lora")
    assert ours == back >= {f"{part}.safetensors" for part in parts}
    for part in parts:
        want, got = (weights.read(tmp_path / name, part) for name in ("ours", "back"))
        assert small_wan.same(got, {name: want[name] for name in want})


def test_a_later_transformer_comes_without_the_lora_of_the_first(tmp_path):
    source, lora = small_wan.write(tmp_path / "in"), tmp_path / "lora.safetensors"
    _lora(lora, small_wan.DIT.dim)
    run.convert([source, lora], tmp_path / "adapted")
    merged = tmp_path / "merged.safetensors"
    save_file({f"model.{k}": x for k, x in small_wan.tensors("dit", seed=1).items()}, merged)
    run.convert([tmp_path / "adapted", merged], tmp_path / "new")
    run.convert([merged, lora], tmp_path / "both")
    assert not (tmp_path / "new" / "lora.safetensors").exists()
    assert (tmp_path / "both" / "lora.safetensors").exists()
