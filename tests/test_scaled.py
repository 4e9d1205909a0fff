"""Checkpoints in eight bits beside scales: every spelling is value times scale, to the bit."""

import functools
import json

import ml_dtypes
import numpy as np
import pytest
import small_wan

from longlive_jax import weights
from longlive_jax.convert import family, run, table
from longlive_jax.convert.source import open_checkpoint
from longlive_jax.errors import InputError

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
INT8, BF16 = np.dtype(np.int8), np.dtype(ml_dtypes.bfloat16)
LARGEST = {E4M3: 448.0, E5M2: 57344.0, INT8: 127.0}
# Spelling: the type of the values, the shape of the scales of 64 outputs and 64 inputs.
SPELLINGS = {
    "comfy, scale_weight": (E4M3, ()),
    "comfy, scale_weight in a list": (E4M3, (1,)),
    "comfy, e5m2": (E5M2, ()),
    "musubi, of each output": (E4M3, (64, 1)),
    "musubi, of blocks": (E4M3, (64, 4, 1)),
    "comfy_quant": (E4M3, ()),
    "comfy_quant, e5m2": (E5M2, ()),
    "comfy_quant, int8": (INT8, ()),
    "comfy_quant, int8 of each output": (INT8, (64, 1)),
    "comfy_quant, int8 of blocks": (INT8, (4, 4)),
    "metadata": (E4M3, ()),
    "lightx2v, int8": (INT8, (64, 1)),
    "lightx2v, fp8": (E4M3, (64, 1)),
    "vllm, flat scales": (INT8, (64,)),
    "deepseek, of blocks": (E4M3, (2, 2)),
    "quanto, int8": (INT8, (64, 1)),
    "quanto, fp8": (E4M3, ()),
}
FORMATS = {E4M3: "float8_e4m3fn", E5M2: "float8_e5m2", INT8: "int8_tensorwise"}


@functools.cache
def plain():
    return small_wan.tensors("dit")


def quantised(name):
    """Whether a matrix is one of those that files have in eight bits: square ones of the blocks."""
    return name.startswith("blocks.") and name.endswith((".q.weight", ".v.weight"))


def by_hand(values, scale):
    """Their product, with scales spread over the matrix one by one."""
    scale = np.asarray(scale, np.float32)
    if scale.size == 1:
        return values.astype(np.float32) * scale.reshape(())
    counts = (*scale.shape[:2], 1)[:2]
    scale = scale.reshape(counts)
    product = np.empty(values.shape, np.float32)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            i = row * counts[0] // values.shape[0]
            j = column * counts[1] // values.shape[1]
            product[row, column] = np.float32(values[row, column]) * scale[i, j]
    return product


def spelled(spelling, *, exact=False, plain_type=np.float16, prefix=""):
    """The tensors of a small transformer in that spelling, its metadata, and what it stands for.

    exact: with scales that are powers of two, of which products lose nothing in any type.
    """
    kind, shape = SPELLINGS[spelling]
    random = np.random.default_rng(0)
    tensors, told, layers = {}, {}, {}
    for name, x in plain().items():
        if not quantised(name):
            tensors[prefix + name] = told[name] = x.astype(plain_type)
            continue
        module = prefix + name.removesuffix(".weight")
        scale = random.uniform(0.5, 2, shape).astype(np.float32) / LARGEST[kind]
        scale = np.exp2(np.round(np.log2(scale))).astype(np.float32) if exact else scale
        values = (x / np.abs(x).max() * LARGEST[kind]).astype(kind)
        told[name] = by_hand(values, scale)
        values_name, scale_name = f"{module}.weight", f"{module}.weight_scale"
        if spelling.startswith(("comfy, ", "musubi")):
            scale_name = f"{module}.scale_weight"
            tensors[f"{module}.scale_input"] = np.ones((), np.float32)
        elif spelling.startswith("deepseek"):
            scale_name += "_inv"
        elif spelling.startswith("quanto"):
            values_name, scale_name = f"{module}.weight._data", f"{module}.weight._scale"
            tensors[f"{module}.input_scale"] = np.ones((), np.float32)
            tensors[f"{module}.output_scale"] = np.ones((), np.float32)
        said = {"format": "int8_blockwise" if "int8 of blocks" in spelling else FORMATS[kind]}
        if spelling.startswith("comfy_quant"):
            text = json.dumps(said | {"full_precision_matrix_mult": True}).encode()
            tensors[f"{module}.comfy_quant"] = np.frombuffer(text, np.uint8)
        layers[module] = said
        tensors[values_name], tensors[scale_name] = values, scale
    if spelling.startswith(("comfy, ", "musubi")):
        tensors[prefix + "scaled_fp8"] = np.zeros(2, kind)
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return tensors, (metadata if spelling == "metadata" else {}), told


def write(folder, name, tensors, metadata=None):
    weights.write(folder, name, table.unchanged(tensors), metadata=metadata or {})
    return folder / f"{name}.safetensors"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_matrix_is_its_values_times_its_scales(tmp_path, spelling):
    tensors, metadata, told = spelled(spelling)
    path = write(tmp_path, "dit", tensors, metadata)
    (part,) = family.read(path, dtype=np.float32).parts
    assert part.name == "dit" and part.plain
    assert small_wan.same(part.tensors, told)
    assert "are dequantised to float32" in part.note
    assert f"8 in {SPELLINGS[spelling][0].name}" in part.note


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_nothing_is_lost_where_nothing_can_be(tmp_path, spelling):
    """With scales that are powers of two: as the file that was never quantised."""
    tensors, metadata, told = spelled(spelling, exact=True, plain_type=BF16)
    (part,) = family.read(write(tmp_path, "dit", tensors, metadata)).parts
    assert small_wan.same(part.tensors, {k: x.astype(BF16) for k, x in told.items()})


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model.", ""])
@pytest.mark.parametrize("spelling", ["comfy, scale_weight", "comfy_quant", "metadata"])
def test_prefixes_before_scaled_matrices(tmp_path, prefix, spelling):
    tensors, metadata, told = spelled(spelling, prefix=prefix)
    (part,) = family.read(write(tmp_path, "dit", tensors, metadata), dtype=np.float32).parts
    assert small_wan.same(part.tensors, told)
    assert part.plain == (prefix != "model.")


def test_a_converted_model_is_that_of_the_plain_file(tmp_path):
    tensors, _, told = spelled("lightx2v, int8", exact=True, plain_type=BF16)
    plain = write(tmp_path, "plain", {k: x.astype(BF16) for k, x in told.items()})
    notes = run.convert([write(tmp_path, "scaled", tensors)], tmp_path / "a")
    run.convert([plain], tmp_path / "b")
    assert "are dequantised to bfloat16" in notes[0]
    files = [tmp_path / name / "dit.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_flag_decides_on_the_type_before_anything_is_rounded(tmp_path):
    tensors, _, told = spelled("comfy, scale_weight")
    run.convert([write(tmp_path, "scaled", tensors)], tmp_path / "a", dtype="float32")
    got = weights.read(tmp_path / "a", "dit")["blocks.self_attn.q.kernel"]
    want = np.stack([told[f"blocks.{i}.self_attn.q.weight"].T for i in range(2)])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("others", "kind"),
    [
        ((np.float16,), np.float16),
        ((BF16,), BF16),
        ((np.float32,), np.float32),
        ((np.float32, BF16), BF16),
        ((np.float32, np.float16), np.float16),
    ],
)
def test_the_type_is_that_of_the_rest_of_the_file(tmp_path, others, kind):
    tensors, _, _ = spelled("comfy, scale_weight", plain_type=others[0])
    for name in [name for name in tensors if name.startswith("head.")]:
        tensors[name] = tensors[name].astype(others[-1])
    (part,) = family.read(write(tmp_path, "dit", tensors)).parts
    assert part.tensors.spec("blocks.0.self_attn.q.weight").dtype == kind
    assert part.tensors["blocks.0.self_attn.q.weight"].dtype == kind


def test_a_text_encoder_is_scaled_too(tmp_path):
    tensors = small_wan.tensors("text", "transformers")
    name = "encoder.block.0.layer.0.SelfAttention.q"
    scale = np.float32(0.003)
    values = (tensors[f"{name}.weight"] / 0.003).astype(E4M3)
    tensors |= {f"{name}.weight": values, f"{name}.scale_weight": np.array(scale)}
    tensors["scaled_fp8"] = np.zeros(0, E4M3)
    (part,) = family.read(write(tmp_path, "text", tensors), dtype=np.float32).parts
    assert part.name == "text"
    np.testing.assert_array_equal(part.tensors[f"{name}.weight"], values.astype(np.float32) * scale)


def test_blocks_of_a_file_may_have_other_types(tmp_path):
    """Some files keep the first and the last block in more bits."""
    tensors = {name: x.astype(BF16) for name, x in small_wan.tensors("dit").items()}
    tensors["blocks.0.self_attn.q.weight"] = tensors["blocks.0.self_attn.q.weight"].astype(E4M3)
    tensors["blocks.0.self_attn.k.weight"] = tensors["blocks.0.self_attn.k.weight"].astype(
        np.float16
    )
    run.convert([write(tmp_path, "dit", tensors)], tmp_path / "a")
    kept = weights.read(tmp_path / "a", "dit")
    for letter, kind in (("q", BF16), ("k", np.float32)):
        got = kept[f"blocks.self_attn.{letter}.kernel"]
        names = [f"blocks.{i}.self_attn.{letter}.weight" for i in range(2)]
        np.testing.assert_array_equal(got, np.stack([tensors[n].astype(kind).T for n in names]))


Q = "blocks.0.self_attn.q"
CONFIG = f"{Q}.comfy_quant"


def json_bytes(**fields):
    return np.frombuffer(json.dumps(fields).encode(), np.uint8)


REFUSED = {
    "nvfp4": ({CONFIG: json_bytes(format="nvfp4")}, "is quantised as nvfp4, which is not read"),
    "mxfp8": ({CONFIG: json_bytes(format="mxfp8")}, "is quantised as mxfp8, which is not read"),
    "rotated": (
        {CONFIG: json_bytes(format="int8_tensorwise", convrot=True)},
        "is quantised as int8_tensorwise with convrot, which is not read",
    ),
    "no format": ({CONFIG: json_bytes(bits=4)}, "is quantised as an unnamed format with bits"),
    "no JSON": ({CONFIG: np.zeros(3, np.uint8)}, "comfy_quant, line 1 is not JSON"),
    "another type": ({CONFIG: json_bytes(format="float8_e5m2")}, "is float8_e5m2, but it is int8"),
    "ModelOpt": ({f"{Q}.weight_scale_2": np.ones((), np.float32)}, "quantised by NVFP4 (ModelOpt)"),
    "bitsandbytes": ({f"{Q}.weight.absmax": np.ones(3, np.float32)}, "quantised by bitsandbytes"),
    "int8 of bitsandbytes": ({f"{Q}.SCB": np.ones(3, np.float32)}, "bitsandbytes (LLM.int8)"),
    "nunchaku": ({f"{Q}.smooth_factor": np.ones(3, np.float16)}, "by Nunchaku (SVDQuant)"),
    "gptq": ({f"{Q}.qweight": np.ones((3, 3), np.int32)}, "quantised by GPTQ or AWQ"),
    "zero points": ({f"{Q}.weight_zero_point": np.zeros(3, np.int8)}, "compressed-tensors"),
    "torchao": ({f"{Q}._weight_qdata": np.zeros(3, np.int8)}, "quantised by torchao"),
    "no scale": ({f"{Q}.weight_scale": None}, f"holds {Q}.weight as int8 without a scale"),
    "odd scale": (
        {f"{Q}.weight_scale": np.ones((5, 1), np.float32)},
        "a scale that does not fit: blocks.0.self_attn.q.weight_scale is float32 [5, 1] for",
    ),
    "whole scale": ({f"{Q}.weight_scale": np.ones((), np.int32)}, "a scale that does not fit"),
    "two scales": ({f"{Q}.scale_weight": np.ones((), np.float32)}, f"two scales of {Q}.weight"),
    "scale of a plain one": (
        {"head.head.weight_scale": np.ones((), np.float32)},
        "holds head.head.weight as float16 beside a scale",
    ),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_known_is_named_in_one_sentence(tmp_path, change, said):
    tensors, _, _ = spelled("lightx2v, int8")
    tensors = {k: x for k, x in (tensors | change).items() if x is not None}
    with pytest.raises(InputError) as caught:
        family.read(write(tmp_path, "dit", tensors))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert str(tmp_path / "dit.safetensors") in str(caught.value)


def test_a_product_beyond_the_type_is_found(tmp_path):
    tensors, _, _ = spelled("comfy, scale_weight")
    tensors[f"{Q}.scale_weight"] = np.array(1e6, np.float32)
    (part,) = family.read(write(tmp_path, "dit", tensors)).parts
    with pytest.raises(InputError, match=f"the product of {Q}.weight and {Q}.scale_weight holds"):
        part.tensors[f"{Q}.weight"]


@pytest.mark.parametrize("name", ["a.gguf", "a.safetensors"])
def test_gguf_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(InputError, match="is a GGUF file, which is not read"):
        open_checkpoint(tmp_path / name)
