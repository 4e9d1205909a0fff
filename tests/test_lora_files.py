"""LoRA files as people have them: every spelling and kind against a merge by hand."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from longlive_jax import lora, weights
from longlive_jax.config import DiTConfig, Precision
from longlive_jax.convert import family, wan_dit
from longlive_jax.convert.lora_names import LAYERS
from longlive_jax.convert.table import export
from longlive_jax.dit.model import DiT
from longlive_jax.errors import InputError
from longlive_jax.lora_files import LoraFile
from longlive_jax.quant import transformer

CFG = DiTConfig(
    dim=16, ffn_dim=32, heads=2, layers=3, channels=4, text_dim=8, text_len=4, freq_dim=8
)
MODULES = (
    *(f"blocks.{i}.{part}" for i in range(3) for part in ("self_attn.q", "cross_attn.o", "ffn.2")),
    "time_projection.1",
    "text_embedding.0",
    "head.head",
)


@functools.cache
def base():
    """A random transformer, norms and biases included."""
    dit = DiT(CFG, rngs=nnx.Rngs(0))
    draw = np.random.default_rng(0).normal
    flat = weights.flatten(dit)
    return weights.unflatten(
        dit, {name: jnp.asarray(draw(size=x.shape), jnp.float32) for name, x in flat.items()}
    )


def official(dit):
    """Its parameters under the names of the official code, in PyTorch's layouts."""
    return export(dit, wan_dit.rows(CFG))


@functools.cache
def shapes():
    return {path: x.shape for path, x in weights.flatten(base()).items()}


def read(path, strength=1.0):
    return lora.read_all((LoraFile(str(path), strength),), shapes())


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def pairs(modules=MODULES, rank=2, seed=0):
    """A and B by module."""
    made = official(base())
    found = {}
    for number, module in enumerate(modules):
        out, inputs = made[f"{module}.weight"].shape
        found[module] = draw(rank, inputs, seed=seed + number), draw(out, rank, seed=seed + 99)
    return found


def by_hand(changes, strength=1.0):
    """The parameters with differences added: official name → difference."""
    made = {name: x.copy() for name, x in official(base()).items()}
    for name, change in changes.items():
        made[name] += np.float32(strength) * change
    return made


def same(theirs, ours, rtol=1e-5):
    found = official(ours)
    assert found.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=2e-5, err_msg=name)


def diffusers_name(module):
    block = next((part for part in module.split(".") if part.isdigit()), None)
    inside = module.startswith("blocks.")
    layer = LAYERS[module.replace(f".{block}.", ".{i}.", 1) if inside else module]
    return layer.names[1].format(i=block)


DOTS = {
    "peft": "base_model.model.{m}.lora_{AB}.weight",
    "peft, named adapter": "base_model.model.{m}.lora_{AB}.default.weight",
    "bare": "{m}.lora_{AB}.weight",
    "diffusers": "transformer.{d}.lora_{AB}.weight",
    "diffusers, older": "transformer.{d}.lora.{updown}.weight",
    "diffusers, oldest": "transformer.{d}_lora.{updown}.weight",
    "diffusers, kohya": "lora_transformer_{_d}.lora_{updown}.weight",
    "ComfyUI": "diffusion_model.{m}.lora_{updown}.weight",
    "ComfyUI, checkpoint": "model.diffusion_model.{m}.lora_{AB}.weight",
    "DiffSynth": "pipe.dit.{m}.lora_{AB}.default.weight",
    "module": "module.{m}.lora_{AB}.weight",
    "model": "model.{m}.lora_{updown}.weight",
    "no weight": "diffusion_model.{m}.lora_{AB}",
    "musubi": "lora_unet_{_}.lora_{updown}.weight",
    "VideoX-Fun": "lora_unet__{_}.lora_{updown}.weight",
    "LyCORIS": "lycoris_{_}.lora_{updown}.weight",
}


def spelled(spelling, module, side):
    d = diffusers_name(module)
    return spelling.format(
        m=module,
        d=d,
        _=module.replace(".", "_"),
        _d=d.replace(".", "_"),
        AB=side,
        updown={"A": "down", "B": "up"}[side],
    )


@pytest.mark.parametrize("spelling", DOTS)
def test_every_spelling_is_the_merge_by_hand(tmp_path, spelling):
    """Every second layer has an alpha of its own; the others have scale 1."""
    tensors, changes = {}, {}
    for number, (module, (a, b)) in enumerate(pairs().items()):
        names = [spelled(DOTS[spelling], module, side) for side in "AB"]
        tensors |= dict(zip(names, (a, b), strict=True))
        alpha = None if number % 2 else 0.5 + number
        if alpha is not None:
            ending = next(x for x in ("_lora.", ".lora_", ".lora.") if x in names[0])
            tensors[f"{names[0].rpartition(ending)[0]}.alpha"] = np.array(alpha, np.float32)
        changes[f"{module}.weight"] = (1 if alpha is None else alpha / 2) * (b @ a)
    save_file(tensors, tmp_path / "lora.safetensors")
    found = read(tmp_path / "lora.safetensors", 0.75)
    same(by_hand(changes, 0.75), lora.merge(base(), found))
    assert not found.notes


def test_the_same_layer_in_two_spellings_is_refused():
    tensors = {}
    for prefix, module in (("diffusion_model", "self_attn.q"), ("transformer", "attn1.to_q")):
        for side, shape in (("A", (2, 16)), ("B", (16, 2))):
            tensors[f"{prefix}.blocks.0.{module}.lora_{side}.weight"] = draw(*shape)
    with pytest.raises(InputError, match="occurs twice"):
        lora.from_tensors(tensors)


DIFFS = {  # the parameter, and how it is spelled
    "blocks.1.self_attn.q.weight": "diffusion_model.blocks.1.self_attn.q.diff",
    "blocks.1.self_attn.q.bias": "diffusion_model.blocks.1.self_attn.q.diff_b",
    "blocks.0.ffn.0.bias": "lora_unet_blocks_0_ffn_0.diff_b",
    "blocks.2.norm3.weight": "diffusion_model.blocks.2.norm3.diff",
    "blocks.2.norm3.bias": "diffusion_model.blocks.2.norm3.diff_b",
    "blocks.0.norm3.weight": "lycoris_blocks_0_norm3.w_norm",
    "blocks.0.norm3.bias": "lycoris_blocks_0_norm3.b_norm",
    "blocks.1.norm3.weight": "transformer.blocks.1.norm2.diff",
    "blocks.0.self_attn.norm_q.weight": "diffusion_model.blocks.0.self_attn.norm_q.diff",
    "blocks.0.cross_attn.norm_k.weight": "transformer.blocks.0.attn2.norm_k.diff",
    "blocks.0.modulation": "diffusion_model.blocks.0.diff_m",
    "blocks.2.modulation": "diffusion_model.blocks.2.modulation.diff",
    "head.modulation": "diffusion_model.head.diff_m",
    "head.head.weight": "diffusion_model.head.head.diff",
    "head.head.bias": "diffusion_model.head.head.diff_b",
    "patch_embedding.weight": "diffusion_model.patch_embedding.diff",
    "patch_embedding.bias": "diffusion_model.patch_embedding.diff_b",
    "time_embedding.2.bias": "diffusion_model.time_embedding.2.diff_b",
}


def diffs():
    made = official(base())
    return {name: draw(*made[name].shape, seed=7) for name in DIFFS}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_differences_of_whole_parameters_beside_pairs(tmp_path, dtype):
    tensors = {DIFFS[name]: x.astype(dtype) for name, x in diffs().items()}
    changes = {name: tensors[DIFFS[name]].astype(np.float32) for name in DIFFS}
    for module, (a, b) in pairs(("blocks.1.self_attn.q", "blocks.1.ffn.2")).items():
        for side, x in (("A", a), ("B", b)):
            tensors[f"diffusion_model.{module}.lora_{side}.weight"] = x
        changes[f"{module}.weight"] = changes.get(f"{module}.weight", 0) + b @ a
    save_file(tensors, tmp_path / "lora.safetensors")
    found = read(tmp_path / "lora.safetensors", -0.5)
    adapted = lora.apply(base(), found)
    same(by_hand(changes, -0.5), lora.merge(base(), found))
    flat = weights.flatten(adapted)
    kernel = flat["blocks.self_attn.norm_q.scale"]
    np.testing.assert_array_equal(kernel[...], kernel.value)  # what the model computes with
    jax.tree.map(np.testing.assert_array_equal, lora.bare(adapted), base())
    again = lora.apply(adapted, found)
    jax.tree.map(np.testing.assert_array_equal, again, adapted)


def test_an_adapted_model_computes_what_the_merged_one_does(tmp_path):
    tensors = {DIFFS[name]: 0.1 * x for name, x in diffs().items()}
    for module, (a, b) in pairs(MODULES, rank=3).items():
        tensors |= {f"{module}.lora_A.weight": 0.1 * a, f"{module}.lora_B.weight": b}
    save_file(tensors, tmp_path / "lora.safetensors")
    found = read(tmp_path / "lora.safetensors", 0.5)

    @jax.jit
    def computed(dit):
        kv = dit.text_kv(jnp.ones((1, 1, 4, 8)))
        return dit.time_embedding(jnp.full((1, 1), 300.0)), kv.k, kv.v

    merged, unmerged = computed(lora.merge(base(), found)), computed(lora.apply(base(), found))
    for ours, theirs, without in zip(unmerged, merged, computed(base()), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        assert np.abs(theirs - without).max() > 1e-2


def test_ranks_and_alphas_of_their_own_and_some_blocks_only(tmp_path):
    """Blocks 0 and 2 of one layer, block 1 of another; a rank for each."""
    tensors, changes = {}, {}
    table = (("blocks.0.ffn.0", 1, None), ("blocks.2.ffn.0", 4, 2.0), ("blocks.1.ffn.2", 3, 1.0))
    for module, rank, alpha in table:
        ((a, b),) = pairs((module,), rank).values()
        names = [f"diffusion_model.{module}.lora_{side}.weight" for side in "AB"]
        tensors |= dict(zip(names, (a, b), strict=True))
        if alpha:
            tensors[f"diffusion_model.{module}.alpha"] = np.array(alpha)
        changes[f"{module}.weight"] = (alpha / rank if alpha else 1) * (b @ a)
    save_file(tensors, tmp_path / "lora.safetensors")
    found = read(tmp_path / "lora.safetensors")
    same(by_hand(changes), lora.merge(base(), found))
    for naming in ("peft", "diffusers"):
        lora.save(tmp_path / "again.safetensors", found, naming)
        assert len(load_file(tmp_path / "again.safetensors")) == 6
        same(by_hand(changes), lora.merge(base(), read(tmp_path / "again.safetensors")))
    with pytest.raises(InputError, match=r"one rank, not of \[1, 3, 4\]"):
        lora.unscaled(found)


def test_whole_changes_are_saved_in_our_files_alone(tmp_path):
    save_file({DIFFS[name]: x for name, x in diffs().items()}, tmp_path / "lora.safetensors")
    found = read(tmp_path / "lora.safetensors")
    lora.save(tmp_path / "again.safetensors", found)
    jax.tree.map(
        np.testing.assert_array_equal, read(tmp_path / "again.safetensors").changes, found.changes
    )
    with pytest.raises(InputError, match="which diffusers does not read: merge it first"):
        lora.export(found, "diffusers")
    with pytest.raises(InputError, match="LongLive's code knows no .* merge it first"):
        lora.unscaled(found)


def test_fused_layers_of_diffusers_are_taken_apart(tmp_path):
    name = "transformer.blocks.1.attn1.to_qkv"
    a, b, bias = draw(2, 16), draw(48, 2), draw(48, seed=1)
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.diff_b": bias}
    kv = "transformer.blocks.0.attn2.to_kv"
    tensors |= {f"{kv}.lora_A.weight": a, f"{kv}.lora_B.weight": b[:32]}
    tensors[f"{kv}.alpha"] = np.array(1.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    changes = {}
    for i, part in enumerate("qkv"):
        rows = slice(16 * i, 16 * i + 16)
        changes[f"blocks.1.self_attn.{part}.weight"] = b[rows] @ a
        changes[f"blocks.1.self_attn.{part}.bias"] = bias[rows]
    for i, part in enumerate("kv"):
        changes[f"blocks.0.cross_attn.{part}.weight"] = 0.5 * (b[16 * i : 16 * i + 16] @ a)
    same(by_hand(changes), lora.merge(base(), read(tmp_path / "lora.safetensors")))


# What peft says beside the tensors.


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("prefix", ["", "^"])
def test_what_peft_says_of_alpha(tmp_path, rslora, prefix):
    config = {
        "r": 2,
        "lora_alpha": 6,
        "rank_pattern": {"ffn.2": 4},
        "alpha_pattern": {f"{prefix}blocks.1.ffn.2": 1, "self_attn.q": 3},
        "use_rslora": rslora,
    }
    tensors, changes = {}, {}
    for module, (a, b) in pairs().items():
        rank = 4 if module.endswith("ffn.2") else 2
        a, b = np.concatenate([a, a])[:rank], np.concatenate([b, b], 1)[:, :rank].copy()
        names = [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"]
        tensors |= dict(zip(names, (a, b), strict=True))
        alpha = {"blocks.1.ffn.2": 1}.get(module, 3 if module.endswith("self_attn.q") else 6)
        scale = alpha / (rank**0.5 if rslora else rank)
        changes[f"{module}.weight"] = scale * (b @ a)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        same(by_hand(changes), lora.merge(base(), read(path)))
    for alphas in ({"blocks.[0-9]+.ffn": 1}, {"ffn": "x"}, ["ffn"]):
        config["alpha_pattern"] = alphas
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match="alpha_pattern"):
            read(tmp_path)


def test_the_bias_of_b_is_scaled_with_it():
    tensors = {
        "transformer.blocks.0.attn1.to_q.lora_A.weight": draw(2, 16),
        "transformer.blocks.0.attn1.to_q.lora_B.weight": draw(16, 2),
        "transformer.blocks.0.attn1.to_q.lora_B.bias": draw(16),
    }
    found = lora.from_tensors(tensors, alpha=3, blocks=3)
    np.testing.assert_allclose(found.changes["blocks.self_attn.q.bias"][0], 1.5 * draw(16))
    assert not found.changes["blocks.self_attn.q.bias"][1:].any()


# Image-to-video.


def test_parts_for_images_are_skipped_and_said(tmp_path):
    tensors = {}
    for module in ("self_attn.q", "cross_attn.k_img", "cross_attn.v_img"):
        for side, shape in (("A", (2, 16)), ("B", (16, 2))):
            tensors[f"diffusion_model.blocks.0.{module}.lora_{side}.weight"] = draw(*shape)
    tensors["diffusion_model.blocks.0.cross_attn.norm_k_img.diff"] = draw(16)
    tensors["diffusion_model.img_emb.proj.1.diff_b"] = draw(16)
    tensors["transformer.condition_embedder.image_embedder.ff.net.2.lora_B.bias"] = draw(16)
    tensors["transformer.blocks.1.attn2.add_k_proj.lora_A.weight"] = draw(2, 16)
    wide = draw(16, 9, 1, 2, 2)  # latents, then what shows the image
    tensors["diffusion_model.patch_embedding.diff"] = wide
    save_file(tensors, tmp_path / "lora.safetensors")
    found = read(tmp_path / "lora.safetensors")
    changes = {"patch_embedding.weight": wide[:, :4]}
    changes["blocks.0.self_attn.q.weight"] = draw(16, 2) @ draw(2, 16)
    same(by_hand(changes), lora.merge(base(), found))
    first, second = found.notes
    said = "lora.safetensors: skipped 8 tensors of modules that only an image-to-video model has"
    assert first.startswith(f"{tmp_path}/{said}")
    assert "k_img.lora_A.weight" in first and "and 5 more" in first
    assert "5 of 9 input channels of patch_embedding" in second
    alone = {name: x for name, x in tensors.items() if "_img" in name or "image" in name}
    with pytest.raises(InputError, match="only has parts of an image-to-video model"):
        lora.from_tensors(alone)


# Other kinds.


def lycoris(kind, rank=2):
    """One layer's tensors, and the difference that they describe."""
    if kind == "LoHa":
        parts = {f"hada_w{n}_a": draw(16, rank, seed=n) for n in (1, 2)}
        parts |= {f"hada_w{n}_b": draw(rank, 16, seed=n + 2) for n in (1, 2)}
        w1, w2 = (parts[f"hada_w{n}_a"] @ parts[f"hada_w{n}_b"] for n in (1, 2))
        return parts, w1 * w2
    if kind == "LoKr, whole":
        parts = {"lokr_w1": draw(4, 2), "lokr_w2": draw(4, 8)}
        return parts, np.kron(parts["lokr_w1"], parts["lokr_w2"])
    parts = {"lokr_w2_a": draw(4, rank), "lokr_w2_b": draw(rank, 4)}
    whole = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    if kind == "LoKr":
        parts["lokr_w1"] = first = draw(4, 4)
    else:
        parts |= {"lokr_w1_a": draw(4, rank, seed=1), "lokr_w1_b": draw(rank, 4, seed=1)}
        first = parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    return parts, np.kron(first, whole)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr, both", "LoKr, whole"])
def test_lycoris_is_the_merge_by_hand(tmp_path, kind):
    """Alpha counts only where a factor has a rank."""
    parts, change = lycoris(kind)
    tensors = {f"lycoris_blocks_1_cross_attn_v.{name}": x for name, x in parts.items()}
    tensors["lycoris_blocks_1_cross_attn_v.alpha"] = np.array(1.0, np.float32)
    save_file(tensors, tmp_path / "lora.safetensors")
    scale = 1 if kind == "LoKr, whole" else 0.5
    found = read(tmp_path / "lora.safetensors", 2)
    same(by_hand({"blocks.1.cross_attn.v.weight": scale * change}, 2), lora.merge(base(), found))
    quantised = transformer.quantize(base(), Precision.of("int8"))
    with pytest.raises(InputError, match="changes all of .*cross_attn.v, which is quantised here"):
        lora.apply(quantised, found)
    tensors.pop(f"lycoris_blocks_1_cross_attn_v.{min(parts)}")
    with pytest.raises(InputError, match=f"lacks a part of its {kind[:4]}: w1"):
        lora.from_tensors(tensors)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector.default.weight", "DoRA"),
        ("oft_blocks", "OFT"),
        ("lokr_t2", "Tucker"),
        ("a1.weight", "GLoRA"),
    ],
)
def test_other_kinds_are_named(name, kind):
    ((a, b),) = pairs(("blocks.0.self_attn.q",)).values()
    module = "diffusion_model.blocks.0.self_attn.q"
    tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    with pytest.raises(InputError, match=rf"an adapter of the kind {kind} \({module}.{name}\)"):
        lora.from_tensors(tensors | {f"{module}.{name}": draw(16, 1)})


# Several files, and strengths.


def two(folder):
    """Two files: one of pairs, one of a larger rank with differences."""
    one = {}
    for module, (a, b) in pairs().items():
        one |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b, f"{module}.alpha": 1.0}
    save_file({name: np.asarray(x, np.float32) for name, x in one.items()}, folder / "one")
    other = {DIFFS[name]: x for name, x in diffs().items()}
    for module, (a, b) in pairs(MODULES[:4], rank=5, seed=50).items():
        other |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file(other, folder / "other")
    for name in ("one", "other"):
        (folder / name).rename(folder / f"{name}.safetensors")
    return [str(folder / f"{name}.safetensors") for name in ("one", "other")]


def merged(*files):
    return lora.merge(base(), lora.read_all([LoraFile(*file) for file in files], shapes()))


def test_strengths_add_up(tmp_path):
    one, other = two(tmp_path)
    for file in (one, other):
        whole = merged((file, 1.0))
        same(official(whole), merged((file, 0.5), (file, 0.5)), rtol=1e-4)
        same(official(base()), merged((file, 1.0), (file, -1.0)), rtol=1e-4)
        assert np.abs(official(whole)["blocks.0.ffn.2.weight"]).max() > 0
    parts = [official(merged((file, s))) for file, s in ((one, 0.25), (other, -2.0))]
    start = official(base())
    sums = {name: parts[0][name] + parts[1][name] - x for name, x in start.items()}
    same(sums, merged((one, 0.25), (other, -2.0)), rtol=1e-4)
    assert lora.read_all([LoraFile(one, 0.0)], shapes()) is None
    jax.tree.map(
        np.testing.assert_array_equal, merged((one, 1.0), (other, 0.0)), merged((one, 1.0))
    )


def test_the_structure_does_not_depend_on_the_strength(tmp_path):
    """So no program is compiled for another one."""
    one, other = two(tmp_path)
    adapted = [
        lora.apply(base(), lora.read_all([LoraFile(one, s), LoraFile(other, -s)], shapes()))
        for s in (1.0, 0.3)
    ]
    assert jax.tree.structure(adapted[0]) == jax.tree.structure(adapted[1])


def test_a_lora_of_another_depth_is_refused(tmp_path):
    deep = {}
    for module, (a, b) in pairs(("blocks.2.ffn.2",)).items():
        module = module.replace("2", "3", 1)
        deep |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file(deep, tmp_path / "deep.safetensors")
    said = r"deep.safetensors: .* of another model: it changes block 3, this one has 3"
    with pytest.raises(InputError, match=said):
        read(tmp_path / "deep.safetensors")


def test_a_small_file_fills_no_memory():
    for block, rank, said in (
        (999_999, 1, "has so many"),
        (999, 40_000, "even"),
    ):
        tensors = {
            f"blocks.{block}.self_attn.q.lora_A.weight": np.zeros((rank, 16), np.float16),
            f"blocks.{block}.self_attn.q.lora_B.weight": np.zeros((16, rank), np.float16),
        }
        with pytest.raises(InputError, match=said):
            lora.from_tensors(tensors)


def test_a_lora_without_the_word_is_known_as_one(tmp_path):
    parts, _ = lycoris("LoKr")
    tensors = {f"lycoris_blocks_1_cross_attn_v.{name}": x for name, x in parts.items()}
    tensors["diffusion_model.blocks.0.diff_m"] = draw(1, 6, 16)
    tensors["diffusion_model.blocks.0.cross_attn.v.alpha"] = np.array(1.0)
    path = tmp_path / "lokr.safetensors"
    save_file(tensors, path)
    assert family.read(path).lora == path


# peft and diffusers themselves.


def test_differences_are_those_that_diffusers_reads():
    """Its converter calls the differences of biases biases of B."""
    parity.needed("torch", "diffusers")
    from diffusers.loaders import lora_conversion_utils as theirs

    tensors, changes = {}, {}
    parts = [f"{kind}_attn.{x}" for kind in ("self", "cross") for x in "qkvo"]
    linear = [f"blocks.{i}.{part}" for i in range(3) for part in (*parts, "ffn.0", "ffn.2")]
    for module, (a, b) in pairs(linear).items():
        name, bias = f"diffusion_model.{module}", draw(len(b), seed=3)
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        tensors[f"{name}.diff_b"] = bias
        changes |= {f"{module}.weight": b @ a, f"{module}.bias": bias}
    converted = theirs._convert_non_diffusers_wan_lora_to_diffusers(dict(tensors))
    for found in (tensors, converted):
        same(by_hand(changes), lora.merge(base(), lora.from_tensors(found)), rtol=1e-4)


@pytest.mark.parametrize("kind", ["LoRA", "rsLoRA", "LoKr", "LoHa"])
def test_what_peft_merges(tmp_path, kind):
    """Ranks and alphas by patterns, saved by peft and merged by it."""
    torch, peft = parity.needed("torch", "peft")
    torch.manual_seed(0)
    made = official(base())
    module = torch.nn.Module()
    module.blocks = torch.nn.ModuleList()
    for i in range(3):
        block = torch.nn.Module()
        block.ffn = torch.nn.Sequential(
            torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16)
        )
        module.blocks.append(block)
        with torch.no_grad():
            for part in (0, 2):
                for leaf in ("weight", "bias"):
                    value = made[f"blocks.{i}.ffn.{part}.{leaf}"].copy()
                    getattr(block.ffn[part], leaf).copy_(torch.from_numpy(value))
    patterns = dict(rank_pattern={"blocks.1.ffn.0": 3}, alpha_pattern={"blocks.2.ffn.2": 5})
    targets = ["ffn.0", "ffn.2"]
    config = {
        "LoRA": lambda: peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, **patterns),
        "rsLoRA": lambda: peft.LoraConfig(r=2, use_rslora=True, target_modules=targets, **patterns),
        "LoKr": lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=targets, **patterns),
        "LoHa": lambda: peft.LoHaConfig(r=2, alpha=6, target_modules=targets, **patterns),
    }[kind]()
    wrapped = peft.get_peft_model(module, config)
    with torch.no_grad():
        for name, x in wrapped.named_parameters():
            if any(part in name for part in ("lora_", "lokr_", "hada_")):
                x.copy_(torch.randn_like(x))
    wrapped.save_pretrained(tmp_path)
    ours = official(lora.merge(base(), read(tmp_path)))
    for name, x in wrapped.merge_and_unload().state_dict().items():
        np.testing.assert_allclose(ours[name], x.numpy(), rtol=1e-4, atol=1e-4, err_msg=name)
        changed = name.endswith("weight")
        assert (np.abs(ours[name] - made[name]).max() > 0.1) == changed


def test_a_quantised_model_keeps_the_differences_of_its_other_parameters(tmp_path):
    tensors = {DIFFS[name]: x for name, x in diffs().items() if not name.endswith("attn.q.weight")}
    save_file(tensors, tmp_path / "a.safetensors")
    found = read(tmp_path / "a.safetensors")
    adapted = transformer.quantize(lora.apply(base(), found), Precision.of("int8"))
    after = lora.apply(transformer.quantize(base(), Precision.of("int8")), found)
    jax.tree.map(np.testing.assert_array_equal, adapted, after)
    assert dataclasses.is_dataclass(weights.flatten(after)["blocks.modulation"])
