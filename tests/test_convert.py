"""Published files in and out: every name, every family, round trips, and what is refused."""

import dataclasses
import errno
import functools
import gzip
import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import parity
import pytest
import small_wan
import training
import wan
from longlive_kernels.nvfp4 import NVFP4, RULES
from longlive_kernels.nvfp4.format import swizzle
from longlive_kernels.nvfp4.quantize import dequantize, quantize
from safetensors.numpy import save_file
from test_dit import run as forward

import longlive_jax
from longlive_jax import cli, config, layers, lora, weights
from longlive_jax.config import SHIPPED
from longlive_jax.convert import family, nvfp4, run, table, wan_dit, wan_vae
from longlive_jax.convert.lora import LINEARS
from longlive_jax.convert.source import Stored, Tensors
from longlive_jax.dit import mask
from longlive_jax.errors import InputError
from longlive_jax.vae import vae as vaes

torch = parity.optional("torch")
safetensors_torch = parity.optional("safetensors.torch")

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


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_K2_wan_vae(golden, facts, layout, tmp_path):
    """Under either naming, and in both scalings. The decoder is not part of the case."""
    case, said = golden("longlive1", "K2_wan_vae"), facts("longlive1", "K2_wan_vae")
    cfg = dataclasses.replace(config.WAN21_VAE, encoder_dim=4, decoder_dim=4, latent_channels=4)
    cfg = dataclasses.replace(cfg, **{k: tuple(case[f"in/{k}"].tolist()) for k in ("mean", "std")})
    tensors, start = small_wan.tensors("vae", cfg=cfg), 0
    for name in sorted(n for n in tensors if n.startswith(("encoder.", "conv1."))):
        shape, end = tensors[name].shape, start + tensors[name].size
        tensors[name], start = case["w"][start:end].reshape(shape), end
    assert start == len(case["w"])
    pairs = zip(wan_vae.rows(cfg), wan_vae.rows_diffusers(cfg), strict=True)
    names = {row.source: {"wan": row, "diffusers": other}[layout].source for row, other in pairs}
    folder = tmp_path / "vae"
    folder.mkdir()
    save_file({names[k]: v for k, v in tensors.items()}, folder / "model.safetensors")
    statistics = {f"latents_{k}": getattr(cfg, k) for k in ("mean", "std")}
    (folder / "config.json").write_text(json.dumps(statistics))
    run.convert([folder], tmp_path / "ours")
    found = config.from_json(json.loads((tmp_path / "ours" / "config.json").read_text())).vae
    assert found == cfg
    held = weights.read(tmp_path / "ours", "vae")
    vae = weights.place(run.abstract("vae", cfg), held, dtype=jnp.float32)
    z = jax.jit(vaes.encode)(vae, wan.channel_last(case["in/video"]))
    unscaled = vaes.denormalise(cfg, z)
    for name, got in {"official_encoded": z, "diffusers_encoded_unscaled": unscaled}.items():
        atol = said["tolerance"][f"out/{name}"]["atol"]
        np.testing.assert_allclose(
            wan.channel_first(got), case[f"out/{name}"], rtol=0, atol=atol, err_msg=name
        )


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


BLOCKS = [path for path in LINEARS if path.startswith("blocks.")]


@pytest.mark.parametrize("name", ["static_4", "static_6", "mse"])
@pytest.mark.parametrize("kind", ["normal_fp32_1d", "heavy_fp32_2d"])
def test_the_rule_is_told_by_the_scales(golden, name, kind):
    """In the reference's bytes; what is cut out of them are the numbers that they were."""
    case = golden("longlive2", f"11_nvfp4_{name}")
    parts = [case[f"out/{kind}/{key}"] for key in ("packed", "scales_blocked", "amax")]
    packed, scales, amax = nvfp4.matrix(*parts, np.array([128, 128, 128, 128]))
    assert nvfp4.rule(packed, scales) == name
    ours = dequantize(NVFP4(*map(jnp.asarray, (packed, scales, amax)), name))
    np.testing.assert_allclose(ours, case[f"out/{kind}/dequant"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("tile", [1, 16])
@pytest.mark.parametrize("rule", RULES)
def test_rules_are_told_apart(rule, tile):
    """Those that choose by error are read alike."""
    quantized = jax.jit(functools.partial(quantize, rule=rule, tile=tile))
    for seed in range(4):
        x = jax.random.normal(jax.random.key(seed), (32, 64)) * 10.0 ** (4 * seed - 8)
        q = quantized(x * jnp.exp(seed * jax.random.normal(jax.random.key(9), (32, 1))))
        told = nvfp4.rule(np.asarray(q.packed), np.asarray(q.scales))
        assert told == (rule if rule.startswith("static") else "mse")


@pytest.mark.parametrize("largest", [128, 416])
def test_scales_of_no_known_rule_are_refused(largest):
    scales = np.full((16, 2), largest, ml_dtypes.float8_e4m3fn)
    with pytest.raises(ValueError, match=f"a largest scale of {largest} is of no rule"):
        nvfp4.rule(np.zeros((16, 16), np.uint8), scales)


def pack(q) -> dict[str, np.ndarray]:
    """The tensors of FourOverSix of one matrix, padded to 128 rows and 64 columns."""
    rows, columns = q.shape
    padding = -rows % 128, -columns % 64
    packed = np.pad(q.packed, ((0, padding[0]), (0, padding[1] // 2)))
    metadata = (rows, columns, rows + padding[0], columns + padding[1])
    return {
        "values": packed,
        "scale_factors": np.asarray(swizzle(q.scales)),
        "amax": np.asarray(q.amax).reshape(1),
        "metadata": np.array(metadata, np.int32),
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A whole model, 32 wide, of one block."""
    return training.write_model(tmp_path_factory.mktemp("model"))


def _official() -> list[str]:
    return [row.source.format(i=0) for row in wan_dit.rows(training.SMALL.dit)]


def packed_file(model, path, rules=("static_6",)) -> pathlib.Path:
    """The transformer of a model as LongLive 2.0 publishes it: `model_4o6.pt`. rules: of its
    matrices in turn.
    """
    held = weights.read(model, "dit")
    pending = table.export_pending(held, wan_dit.rows(training.SMALL.dit))
    linears = {module.format(i=0) for module, _ in (LINEARS[path] for path in BLOCKS)}
    tensors, chosen = {}, itertools.cycle(rules)
    for name, entry in pending.items():
        module = name.removesuffix(".weight")
        if module in linears and module != name:
            q = quantize(jnp.asarray(entry.array()), rule=next(chosen))
            parts = pack(q)
            parts |= {f"transposed_{part}": x for part, x in parts.items()}
            tensors |= {f"{module}.quantized_weight_{part}": x for part, x in parts.items()}
        else:
            tensors[name] = entry.array()
    kinds = {np.dtype(ml_dtypes.float8_e4m3fn): torch.float8_e4m3fn}

    def torched(x):
        bits = torch.from_numpy(np.array(x).view(np.uint8) if x.dtype in kinds else np.array(x))
        return bits.view(kinds[x.dtype]) if x.dtype in kinds else bits

    generator = {f"model.{name}": torched(x) for name, x in tensors.items()}
    torch.save({"generator": generator, "checkpoint_format": "longlive_generator_nvfp4"}, path)
    return path


@pytest.fixture(scope="module")
def packed(plain, tmp_path_factory):
    return packed_file(plain, tmp_path_factory.mktemp("packed") / "model_4o6.pt")


def test_a_packed_file_stays_as_it_is(plain, packed, tmp_path):
    """To the byte: the model is the one whose matrices were packed, and makes the same video."""
    notes = run.convert([plain, packed], tmp_path / "ours")
    assert len(notes) == 1 and "stay in NVFP4, to the byte; --dequantize" in notes[0]
    loaded = longlive_jax.load(tmp_path / "ours")
    assert loaded.config.precision == config.Precision.of("nvfp4", rule="static_6")
    asked = longlive_jax.load(plain).quantized("nvfp4", rule="static_6")
    ours, theirs = (weights.arrays(weights.flatten(x.dit)) for x in (loaded, asked))
    assert small_wan.same(ours, {name: np.asarray(x) for name, x in theirs.items()})
    frames = [x.session("a red circle").next_chunk() for x in (loaded, asked)]
    np.testing.assert_array_equal(*frames)
    shapes = {p: x.shape for p, x in weights.flatten(longlive_jax.load(plain).dit).items()}
    expected = sum(4 + math.prod(shapes[f"{path}.kernel"]) * 9 // 16 for path in BLOCKS)
    assert sum(x.nbytes for name, x in ours.items() if ".kernel." in name) == expected


def test_a_packed_file_is_as_good_as_dequantised(plain, packed, tmp_path):
    """Weights alone in four bits: a forward of both differs by the rounding of numbers to
    bfloat16, in which the one is written, 2^-8 of each weight at most.
    """
    run.convert([plain, packed], tmp_path / "ours")
    run.convert([plain, packed], tmp_path / "dense", dequantize=True)
    assert (
        config.from_json(json.loads((tmp_path / "dense/config.json").read_text())).precision is None
    )
    four = longlive_jax.load(tmp_path / "ours", weights_only=True)
    dense = longlive_jax.load(tmp_path / "dense")
    leaves = weights.flatten(four.dit), weights.flatten(dense.dit)
    for path in BLOCKS:
        ours, theirs = (x[f"{path}.kernel"] for x in leaves)
        rounded = ours.dense().astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(rounded, theirs)
        x = jax.random.normal(jax.random.key(0), (1, 5, ours.shape[1]))
        y, z = layers.product(ours[0], x), layers.product(theirs[0], x)
        assert jnp.linalg.norm(y - z) < 2**-8 * jnp.linalg.norm(z)


def test_what_is_packed_is_unpacked_for_other_code(plain, packed, tmp_path):
    """From the file, and from our folder of it; types that were asked for leave its parts alone."""
    run.convert([plain, packed], tmp_path / "ours", dtype="bfloat16")
    held = weights.read(tmp_path / "ours", "dit")
    assert held.spec("blocks.ffn_in.kernel.amax").dtype == np.float32
    assert held.spec("blocks.ffn_in.kernel.scales").dtype == ml_dtypes.float8_e4m3fn
    assert held.spec("blocks.ffn_in.bias").dtype == ml_dtypes.bfloat16
    run.convert([plain, packed], tmp_path / "dense", dtype="bfloat16", dequantize=True)
    run.convert([tmp_path / "ours"], tmp_path / "again", dequantize=True)
    want = weights.read(tmp_path / "dense", "dit")
    assert small_wan.same(weights.read(tmp_path / "again", "dit"), dict(want))
    run.convert([tmp_path / "ours"], tmp_path / "copy")
    assert small_wan.same(weights.read(tmp_path / "copy", "dit"), dict(held))
    assert (tmp_path / "copy/config.json").read_text() == (
        tmp_path / "ours/config.json"
    ).read_text()
    run.convert([packed], tmp_path / "alone")
    for source, to in ((packed, "one"), (tmp_path / "alone", "other")):
        run.convert([source], tmp_path / to, layout="pytorch")
    name = "diffusion_pytorch_model.safetensors"
    one, other = (safetensors_torch.load_file(tmp_path / to / name) for to in ("one", "other"))
    assert one.keys() == other.keys() == set(_official())
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_plain_transformer_takes_the_place_of_a_packed_one(plain, packed, tmp_path):
    run.convert([plain, packed], tmp_path / "ours")
    run.convert([tmp_path / "ours", plain], tmp_path / "made")
    assert longlive_jax.load(tmp_path / "made").config.precision is None


def test_what_one_model_cannot_keep_is_refused(plain, packed, tmp_path):
    mixed = packed_file(plain, tmp_path / "mixed.pt", ("static_6", "mse"))
    with pytest.raises(InputError, match="more than one rule.*--dequantize unpacks them"):
        run.convert([plain, mixed], tmp_path / "ours")
    run.convert([plain, mixed], tmp_path / "dense", dequantize=True)
    content = torch.load(packed)
    content["generator"]["model.blocks.0.ffn.0.quantized_weight_amax"] *= 0
    scales = content["generator"]["model.blocks.0.ffn.0.quantized_weight_scale_factors"]
    scales.copy_((scales.to(torch.float32) * 0.25).to(torch.float8_e4m3fn))
    torch.save(content, tmp_path / "odd.pt")
    for how in (False, True):
        with pytest.raises(InputError, match="blocks.0.ffn.0.weight .* is of no rule"):
            run.convert([plain, tmp_path / "odd.pt"], tmp_path / f"odd{how}", dequantize=how)
    assert not (tmp_path / "ours").exists() and not (tmp_path / "oddFalse").exists()


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
    more = {"extra.proj.0.weight": np.zeros(3, np.float32)}
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


def _files(folder):
    (folder / "models").mkdir()
    for name in ("longlive_base.pt", "lora.pt"):
        torch.save({"x": torch.zeros(1)}, folder / "models" / name)
    return [folder / "models"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_other_size, "two families are mixed"),
        (_truncated, "cut short"),
        (_promised, "promises vae"),
        (_unexpected, "unexpected: extra.proj.0.weight"),
        (_other_lora, "blocks.self_attn.q"),
        (_lora_among_shards, "mixes a LoRA with other tensors"),
        (_code, "nothing of it was run"),
        (_engine, "TransformerEngine"),
        (_two_transformers, "has two transformers"),
        (_average_only, "say --ema"),
        (_nothing, "holds nothing that is known"),
        (_files, "name one of its files with --from: longlive_base.pt, lora.pt"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, capsys, spoil, message):
    paths = spoil(small_wan.write(tmp_path / "in"))
    flags = [word for path in paths for word in ("--from", str(path))]
    assert cli.run(["convert", *flags, "--to", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
@pytest.mark.parametrize("sign", ["channels", "embedding", "attention"])
def test_image_to_video_is_said_to_be_so(tmp_path, layout, sign):
    """Wan2.1's has all three, Wan2.2's only the channels."""
    names = {
        ("wan", "embedding"): "img_emb.proj.0.weight",
        ("wan", "attention"): "blocks.0.cross_attn.k_img.weight",
        ("diffusers", "embedding"): "condition_embedder.image_embedder.norm1.weight",
        ("diffusers", "attention"): "blocks.0.attn2.add_k_proj.weight",
    }
    tensors = small_wan.tensors("dit", layout)
    if sign == "channels":
        tensors["patch_embedding.weight"] = np.zeros((64, 36, 1, 2, 2), np.float32)
    else:
        tensors[names[layout, sign]] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "i2v.safetensors")
    said = r"i2v.safetensors is an image-to-video model, which is not supported$"
    with pytest.raises(InputError, match=said):
        run.convert([tmp_path / "i2v.safetensors"], tmp_path / "ours")


def _save_vae(path, layout, **widths):
    cfg = dataclasses.replace(small_wan.VAE22, **widths)
    tensors = {k: torch.from_numpy(x) for k, x in small_wan.tensors("vae", layout, cfg=cfg).items()}
    torch.save({"gen_model": tensors} if layout == "diffusers" else tensors, path)
    return cfg


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_the_light_vae_of_a_folder_is_told_from_the_full_one(tmp_path, layout):
    """By what lies beside it; alone, by its words. Never by its name."""
    folder = tmp_path / "in"
    folder.mkdir()
    full = _save_vae(folder / "Wan2.2_VAE.pth", "wan")
    assert [part.name for part in family.read(folder).parts] == ["vae"]
    light = _save_vae(folder / "A_VAE.pth", layout, encoder_dim=2, decoder_dim=4)
    run.convert([folder], tmp_path / "ours")
    cfg = config.from_json(json.loads((tmp_path / "ours" / "config.json").read_text()))
    assert cfg.vae == full and dict(cfg.decoders) == {"light": light}
    (folder / "Wan2.2_VAE.pth").unlink()
    alone = {"wan": "vae", "diffusers": "vae_light"}[layout]
    assert [part.name for part in family.read(folder).parts] == [alone]
    _save_vae(folder / "B_VAE.pth", layout, encoder_dim=2, decoder_dim=4)
    with pytest.raises(InputError, match=f"holds more than one {alone}$"):
        family.read(folder)


def test_a_wan_transformer_on_its_own_is_remarked_upon(tmp_path, capsys):
    source, lora = small_wan.write(tmp_path / "in"), tmp_path / "lora.safetensors"
    _lora(lora, small_wan.DIT.dim)
    generator = tmp_path / "generator.safetensors"
    save_file({f"model.{k}": x for k, x in small_wan.tensors("dit").items()}, generator)

    def said(*paths, **choices):
        flags = [f"--from={path}" for path in paths] + [f"--{k}={v}" for k, v in choices.items()]
        to = tmp_path / str(len(list(tmp_path.iterdir())))
        assert cli.run(["convert", *flags, f"--to={to}"]) == 0
        return capsys.readouterr().err

    note = said(source)
    assert "without LongLive's generator or LoRA" in note and note.count("\n") == 1
    assert said(source, lora) == said(source, generator) == ""
    assert said(source, **{"to-format": "pytorch"}) == ""  # to be run by other code


def test_steps_are_kept_with_the_model(tmp_path, capsys):
    tiny = ["convert", f"--from={SHIPPED / 'tiny'}"]
    assert cli.run([*tiny, f"--to={tmp_path / 'two'}", "--steps=2"]) == 0
    model = longlive_jax.load(str(tmp_path / "two"))
    assert model.config.sampler == dataclasses.replace(config.TINY.sampler, steps=2)
    assert len(model.solver().steps) == 2
    bad = {("--steps=0",): "steps", ("--steps=2", "--to-format=pytorch"): "no place for --steps"}
    for flags, message in bad.items():
        assert cli.run([*tiny, f"--to={tmp_path / 'bad'}", *flags]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    with pytest.raises(InputError, match="from 1 to 1000, not 1001"):
        run.convert([SHIPPED / "tiny"], tmp_path / "bad", steps=1001)
    assert {path.name for path in tmp_path.iterdir()} == {"two"}


def test_a_lora_is_exported_as_longlive_loads_it(tmp_path):
    """`torch.load`, then `set_peft_model_state_dict` with what lies under `generator_lora`."""
    source, path = small_wan.write(tmp_path / "in"), tmp_path / "lora.safetensors"
    _lora(path, small_wan.DIT.dim)
    adapter = lora.read(path, alpha=8)
    lora.save(path, adapter)
    run.convert([source, path], tmp_path / "ours")
    run.convert([tmp_path / "ours"], tmp_path / "out", layout="pytorch")
    held = torch.load(tmp_path / "out" / "lora.pt", weights_only=True)
    assert set(held) == {"generator_lora"}
    theirs = {name: x.numpy() for name, x in held["generator_lora"].items()}
    assert small_wan.same(theirs, lora.export(lora.unscaled(adapter)))
    b = "base_model.model.blocks.1.self_attn.q.lora_B.weight"
    assert (theirs[b] == 2).all()  # alpha / rank
    assert family.read(tmp_path / "out").lora == tmp_path / "out" / "lora.pt"


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
        return loaded.session("a red circle moves left over a black background").next_chunk()

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
