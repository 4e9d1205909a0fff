"""Checkpoints as people have them: wrapped names, .bin, published folders, tokenizers inside."""

import dataclasses
import functools
import io
import json
import pathlib
import shlex

import numpy as np
import parity
import pytest
import sentencepiece
import small_wan
from safetensors.numpy import save_file

import longlive_jax
from longlive_jax import cli, model, published, request, weights
from longlive_jax.config import SHIPPED
from longlive_jax.convert import export, family, run
from longlive_jax.convert.source import open_checkpoint
from longlive_jax.errors import InputError
from longlive_jax.text import tokenizer

DIT = small_wan.tensors("dit")
TEXT = small_wan.tensors("text", "transformers")
VAE = small_wan.tensors("vae")
GENERATOR = {f"model.{name}": x for name, x in DIT.items()}
JUNK = b"\0\5\x16\7 no checkpoint"
HIDDEN = (
    "._diffusion_pytorch_model.safetensors",
    ".DS_Store",
    "Thumbs.db",
    "._x.pt",
    "desktop.ini",
)


def save_pt(path, tensors, group=None):
    torch = parity.needed("torch")
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {name: torch.from_numpy(x) for name, x in tensors.items()}
    torch.save(made if group is None else {group: made}, path)
    return path


def lora(width=64):
    place = "base_model.model.blocks.{}.self_attn.q.lora_{}.weight"
    shapes = {"A": (4, width), "B": (width, 4)}
    halves = ((i, side) for i in range(2) for side in "AB")
    return {place.format(*half): np.ones(shapes[half[1]], np.float32) for half in halves}


def wrapped(name, kind):
    """A name as that wrapper spells it: in front, or between the parts."""
    if kind.startswith("blocks"):
        return name.replace("blocks.0.", f"blocks.0.{kind.removeprefix('blocks:')}.")
    return f"{kind}{name}"


@pytest.mark.parametrize("part", ["dit", "text", "vae"])
@pytest.mark.parametrize(
    "kind",
    [
        *("model.diffusion_model.", "diffusion_model.", "module.", "model.", "module.model."),
        *("model.module.", "_orig_mod.module.", "module._orig_mod.", "generator.model."),
        *("_fsdp_wrapped_module.", "module.model.diffusion_model.", "state_dict.module."),
        *("pipe.dit.", "transformer.", "model._fsdp_wrapped_module."),
        *("blocks:_checkpoint_wrapped_module", "blocks:module", "blocks:_fsdp_wrapped_module"),
    ],
)
def test_a_wrapper_around_names_is_taken_off(tmp_path, part, kind):
    told = {"dit": DIT, "text": TEXT, "vae": VAE}[part]
    path = tmp_path / "a.safetensors"
    save_file({wrapped(name, kind): x for name, x in told.items()}, path)
    (found,) = family.read(path).parts
    assert found.name == part and small_wan.same(found.tensors, told)


@pytest.mark.parametrize(
    ("kind", "plain"),
    [("", True), ("model.diffusion_model.", True), ("model.", False), ("module.", False)],
)
def test_a_training_is_told_from_comfyui(tmp_path, kind, plain):
    save_file({f"{kind}{name}": x for name, x in DIT.items()}, tmp_path / "a.safetensors")
    assert family.read(tmp_path / "a.safetensors").parts[0].plain == plain


def test_all_parts_in_one_file(tmp_path):
    starts = {
        "model.diffusion_model.": DIT,
        "vae.": VAE,
        "text_encoders.umt5xxl.transformer.": TEXT,
    }
    everything = {f"{start}{name}": x for start, told in starts.items() for name, x in told.items()}
    save_file(everything, tmp_path / "all.safetensors")
    found = {part.name: part.tensors for part in family.read(tmp_path / "all.safetensors").parts}
    assert found.keys() == {"dit", "vae", "text"}
    for name, told in zip(("dit", "vae", "text"), (DIT, VAE, TEXT), strict=True):
        assert small_wan.same(found[name], told)


def test_two_names_of_one_tensor_are_refused(tmp_path):
    name = next(iter(DIT))
    save_file(DIT | {f"module.{name}": DIT[name]}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="has one tensor under two names"):
        family.read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "pytorch_model", "model"])
@pytest.mark.parametrize("shards", ["one", "numbered", "indexed"])
def test_a_folder_of_bin_is_read(tmp_path, stem, shards):
    folder = tmp_path / "in"
    names = sorted(DIT)
    halves = [names[:20], names[20:]]
    files = [f"{stem}-0000{i}-of-00002.bin" for i in (1, 2)]
    if shards == "one":
        save_pt(folder / f"{stem}.bin", DIT)
    else:
        for file, half in zip(files, halves, strict=True):
            save_pt(folder / file, {name: DIT[name] for name in half})
    if shards == "indexed":
        places = {name: file for file, half in zip(files, halves, strict=True) for name in half}
        (folder / f"{stem}.bin.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(export.wan_config(small_wan.DIT)))
    save_pt(folder / "training_args.bin", {"x": np.zeros(1, np.float32)})
    (found,) = family.read(folder).parts
    assert small_wan.same(found.tensors, DIT)
    assert found.config() == small_wan.DIT  # which has other heads than its width says
    assert small_wan.same(open_checkpoint(folder).groups[""], DIT)


@pytest.mark.parametrize("left", [0, 1])
def test_a_missing_shard_of_bin_is_named(tmp_path, left):
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    save_pt(tmp_path / files[left], DIT)
    with pytest.raises(InputError, match=f"lacks the shard {files[1 - left]}"):
        family.read(tmp_path)


def test_safetensors_come_before_the_same_in_bin(tmp_path):
    save_file(DIT, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(JUNK)
    (found,) = family.read(tmp_path).parts
    assert small_wan.same(found.tensors, DIT)


def test_components_of_diffusers_in_bin(tmp_path):
    parts = {"transformer": "diffusion_pytorch_model", "text_encoder": "pytorch_model"}
    told = {"transformer": small_wan.tensors("dit", "diffusers"), "text_encoder": TEXT}
    for folder, stem in parts.items():
        save_pt(tmp_path / folder / f"{stem}.bin", told[folder])
    index = {name: ["diffusers", "X"] for name in parts}
    (tmp_path / "model_index.json").write_text("\ufeff" + json.dumps(index), "utf-8")
    found = {part.name: part.tensors for part in family.read(tmp_path).parts}
    assert small_wan.same(found["dit"], told["transformer"])
    assert small_wan.same(found["text"], TEXT)


def test_a_bin_that_runs_code_is_refused(tmp_path):
    torch = parity.needed("torch")
    torch.save({"x": torch.zeros(1), "y": pathlib.PurePosixPath("/")}, tmp_path / "model.bin")
    with pytest.raises(InputError, match="nothing of it was run"):
        family.read(tmp_path)


@pytest.mark.parametrize("inner", ["", "models"])
def test_longlives_folder_is_its_generator_and_its_lora(tmp_path, inner):
    folder = tmp_path / "LongLive-1.3B"
    save_pt(
        folder / inner / "longlive_base.pt", {f"model.{k}": x for k, x in DIT.items()}, "generator"
    )
    save_pt(folder / inner / "lora.pt", lora(), "generator_lora")
    for name in HIDDEN:
        (folder / inner / name).write_bytes(JUNK)
    (folder / "prompts").mkdir()
    found = family.read(folder)
    (part,) = found.parts
    assert small_wan.same(part.tensors, DIT) and not part.plain
    assert found.lora == folder / inner / "lora.pt"


def test_a_folder_of_two_generators_says_so(tmp_path):
    for name in ("a.pt", "b.pt"):
        save_pt(tmp_path / name, GENERATOR, "generator")
    (first,) = family.read(tmp_path / "a.pt").parts
    assert first.name == "dit"
    with pytest.raises(InputError, match="name one of a.pt, b.pt with --from"):
        family.read(tmp_path)


def test_wans_folder_and_what_else_lies_in_it(tmp_path):
    """Other files of a training are not even opened; those of a model that are none, are named."""
    folder = small_wan.write(tmp_path / "in")
    save_pt(folder / "Wan2.1_VAE.pth", VAE)
    save_pt(folder / "models_t5_umt5-xxl-enc-bf16.pth", small_wan.tensors("text"))
    save_pt(folder / "taew_notes.pth", {"x": np.zeros(2, np.float32)})
    (folder / "optimizer.pt").write_bytes(JUNK)
    for name in HIDDEN:
        (folder / name).write_bytes(JUNK)
    found = family.read(folder)
    assert sorted(part.name for part in found.parts) == ["dit", "text", "vae"]
    assert found.tokenizer == folder / "google" / "umt5-xxl"
    assert found.notes == (f"taew_notes.pth in {folder} holds no part of a model and is left out",)


def test_files_of_comfyui_side_by_side(tmp_path):
    save_file(DIT, tmp_path / "wan2.1_t2v_1.3B_fp16.safetensors")
    save_file(TEXT, tmp_path / "umt5_xxl_fp16.safetensors")
    save_file(VAE, tmp_path / "wan_2.1_vae.safetensors")
    found = {part.name: part.tensors for part in family.read(tmp_path).parts}
    assert small_wan.same(found["dit"], DIT) and small_wan.same(found["vae"], VAE)
    assert small_wan.same(found["text"], TEXT)


@functools.cache
def vae22(layout="wan", **widths):
    return small_wan.tensors("vae", layout, cfg=dataclasses.replace(small_wan.VAE22, **widths))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("MG-LightVAE_v2.pth", "diffusers"),
        ("lightvaew2_2.safetensors", "wan"),
        ("lightvaew2_2.pth", "wan"),
    ],
)
def test_a_light_vae_beside_the_full_one(tmp_path, name, layout):
    told = vae22(layout, encoder_dim=2, decoder_dim=4)
    save_pt(tmp_path / "Wan2.2_VAE.pth", vae22())
    if name.endswith(".safetensors"):
        save_file(told, tmp_path / name)
    else:
        save_pt(tmp_path / name, told, "gen_model" if layout == "diffusers" else None)
    found = {part.name: part for part in family.read(tmp_path).parts}
    assert found.keys() == {"vae", "vae_light"}
    assert found["vae_light"].path == tmp_path / name
    assert small_wan.same(found["vae_light"].tensors, told)


def test_a_light_vae_of_wan21_is_told_by_its_name(tmp_path):
    save_file(VAE, tmp_path / "lightvaew2_1.safetensors")
    save_file(VAE, tmp_path / "other.safetensors")
    names = [family.read(path).parts[0].name for path in sorted(tmp_path.iterdir())]
    assert names == ["vae_light", "vae"]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_folder_that_peft_wrote_is_a_lora(tmp_path, suffix):
    path = tmp_path / f"adapter_model.{suffix}"
    if suffix == "bin":
        save_pt(path, lora())
    else:
        save_file(lora(), path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 4}))
    found = family.read(tmp_path)
    assert (found.parts, found.lora) == ((), path)


@pytest.fixture(scope="module")
def spiece():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle moves left", "a blue square moves right"] * 20),
        model_writer=model,
        vocab_size=25,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize("prefix", ["", "text_encoders.umt5xxl.", "module."])
@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_a_tokenizer_inside_a_text_encoder_is_taken_out(tmp_path, spiece, prefix, kind):
    words = np.frombuffer(spiece, np.uint8).view(kind)
    told = {f"{prefix}{name}": x for name, x in TEXT.items()}
    save_file(told | {f"{prefix}spiece_model": words}, tmp_path / "umt5.safetensors")
    found = family.read(tmp_path / "umt5.safetensors")
    assert found.tokenizer == spiece and small_wan.same(found.parts[0].tensors, TEXT)


def test_a_tokenizer_from_inside_is_the_models(tmp_path, spiece):
    save_file(TEXT | {"spiece_model": np.frombuffer(spiece, np.uint8)}, tmp_path / "a.safetensors")
    run.convert([tmp_path / "a.safetensors"], tmp_path / "ours")
    assert (tmp_path / "ours" / "spiece.model").read_bytes() == spiece
    ids, mask = tokenizer.load(tmp_path / "ours", 8)(["a red circle"])
    want = sentencepiece.SentencePieceProcessor(model_proto=spiece).encode_as_ids("a red circle")
    assert ids[0][mask[0]].tolist()[:-1] == want[:7]


def test_a_tokenizer_of_its_own_comes_first(tmp_path, spiece):
    folder = small_wan.write(tmp_path / "in")
    words = np.frombuffer(spiece, np.uint8)
    save_file(TEXT | {"spiece_model": words}, folder / "umt5.safetensors")
    assert family.read(folder).tokenizer == folder / "google" / "umt5-xxl"


@pytest.mark.parametrize("words", [np.zeros(40, np.uint8), np.zeros(0, np.uint8), np.zeros(9)])
def test_a_damaged_tokenizer_is_one_sentence(tmp_path, words):
    save_file(TEXT | {"spiece_model": words}, tmp_path / "a.safetensors")
    with pytest.raises(InputError) as caught:
        family.read(tmp_path / "a.safetensors")
    assert "spiece_model" in str(caught.value) and "\n" not in str(caught.value)


def test_a_published_folder_as_model_says_what_to_type(tmp_path, capsys, monkeypatch):
    """And what it says does what it should."""
    monkeypatch.chdir(tmp_path)
    small_wan.write(tmp_path / "my weights")
    arguments = ["--prompt", "x", "--model", "my weights"]
    assert cli.run(["generate", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "published weights" in said
    command = said.partition("run longlive ")[2].partition(" once, then")[0]
    assert cli.run(shlex.split(command)) == 0
    capsys.readouterr()
    assert cli.run(["generate", "--prompt", "x", "--model", "my weights-longlive"]) == 2
    assert "lacks its text encoder and its VAE" in capsys.readouterr().err


PUBLISHED = {
    "wan": ["config.json", "diffusion_pytorch_model.safetensors"],
    "wan, shards": ["config.json", "diffusion_pytorch_model-00001-of-00002.safetensors"],
    "bin": ["config.json", "diffusion_pytorch_model.bin"],
    "pth": ["Wan2.1_VAE.pth"],
    "longlive": ["models/longlive_base.pt"],
    "diffusers": ["model_index.json", "transformer/diffusion_pytorch_model.safetensors"],
}


@pytest.mark.parametrize("files", PUBLISHED.values(), ids=PUBLISHED)
def test_every_published_layout_is_known_as_such(tmp_path, files):
    for name in files:
        path = tmp_path / "x" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    with pytest.raises(InputError, match="longlive convert --from .* --to x-longlive once, then"):
        model.load(tmp_path / "x")


@pytest.mark.parametrize("name", ["a.safetensors", "a.PT", "a b.pth"])
def test_a_file_as_model_says_what_to_type(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match="longlive convert --from "):
        request.check_model(str(tmp_path / name))


def test_a_folder_of_ours_or_of_nothing_is_not_published(tmp_path):
    for name in ("dit.safetensors", "vae.safetensors"):
        (tmp_path / name).touch()
    assert published.advice(tmp_path) == ""
    with pytest.raises(InputError, match="config.json is missing"):
        longlive_jax.load(tmp_path)
    for folder in (SHIPPED / "tiny", tmp_path / "nowhere", tmp_path.parent):
        assert published.advice(folder) == ""


def test_what_systems_leave_in_a_converted_folder_is_passed_over(tmp_path):
    run.convert([small_wan.write(tmp_path / "in")], tmp_path / "ours")
    for name in HIDDEN:
        (tmp_path / "ours" / name).write_bytes(JUNK)
    assert [part.name for part in family.read(tmp_path / "ours").parts] == ["dit"]
    assert len(weights.read(tmp_path / "ours", "dit")) > 20
