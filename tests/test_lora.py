"""LoRA: what it computes, every naming in and out, merging, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import streams
import wan
from flax import nnx

from longlive_jax import cli, layers, lora, lora_files, weights
from longlive_jax import model as models
from longlive_jax.config import WAN21_T2V_1_3B, StreamConfig, folder_of
from longlive_jax.convert import wan_dit
from longlive_jax.convert.table import export, fill
from longlive_jax.dit import cache as slots
from longlive_jax.dit import mask
from longlive_jax.dit.attention import masked
from longlive_jax.dit.model import DiT
from longlive_jax.dit.rope import phases
from longlive_jax.errors import InputError
from longlive_jax.flow import Flow

LONGLIVE1 = dataclasses.replace(wan.LONGLIVE2, text_len=14, freq_dim=32)
WAYS = {"unmerged": lora.apply, "merged": lora.merge}


@functools.cache
def read(family, case):
    with np.load(wan.GOLDEN / family / f"{case}.npz") as file:
        return dict(file)


def official():
    """A small LoRA under LongLive's names."""
    arrays = wan.weights(read("longlive1", "L_lora"))
    return {name.removeprefix("lora."): x for name, x in arrays.items() if name.startswith("lora.")}


@functools.cache
def base():
    return wan.load(LONGLIVE1, wan.weights(read("longlive1", "B_kv_cache")))


def adapter(alpha=6):
    return lora.from_tensors(official(), alpha=alpha)


# What it computes.


@pytest.mark.parametrize("way", WAYS)
def test_L_lora(golden, facts, way):
    """A chunk of a stream whose transformer has a LoRA."""
    case, said = golden("longlive1", "L_lora"), facts("longlive1", "L_lora")
    dit = WAYS[way](base(), adapter(said["config"]["alpha"]))
    text = streams.text(dit, jnp.asarray(case["in/prompt_embeds"]))
    cache = slots.empty(dit.cfg, StreamConfig(3, 12, 3), 1, streams.TOKENS)
    taken, cache = streams.claim(cache, jnp.int32(0), jnp.int32(0), frames=3, sink=3)
    x, t = jnp.asarray(np.moveaxis(case["in/x"], -3, -1)), jnp.asarray(case["in/timestep"])
    position = jnp.arange(3, dtype=jnp.float32)[None]
    v, _ = streams.call(dit, cache, taken, cache.filled, position, x, t, text)
    for name, ours in (("flow", v), ("x0", Flow(5.0).to_x0(v, x, t))):
        atol = said["tolerance"][f"out/{name}"]["atol"]
        np.testing.assert_allclose(np.moveaxis(ours, -1, -3), case[f"out/{name}"], atol=atol)


def forward(dit, x, t, text, *, chunk=4):
    """The velocity of four latent frames in chunks; by default every frame sees every other."""
    angles = phases(dit.cfg, jnp.arange(4, dtype=jnp.float32)[None], 2, 2)
    table = mask.table(mask.clean(4, chunk))
    return dit(x, t, dit.text_kv(text), masked(table, angles))[0]


velocity = streams.jit(forward, static_argnames="chunk")


@pytest.mark.parametrize(("way", "name"), [("unmerged", "adapter"), ("merged", "merged")])
def test_13_lora(golden, facts, way, name):
    case, said = golden("longlive2", "13_lora"), facts("longlive2", "13_lora")
    dit = wan.longlive2("gen")
    dit = WAYS[way](dit, lora.from_tensors(wan.weights(case), alpha=said["config"]["alpha"]))
    x, t = wan.channel_last(case["in/x"]), jnp.asarray(case["in/t"])
    v = velocity(dit, x, t, jnp.asarray(case["in/context"])[:, None], chunk=2)
    np.testing.assert_allclose(wan.channel_first(v), case[f"out/velocity_{name}"], atol=1e-4)


def test_13_lora_merged_weights(golden, facts):
    case, said = golden("longlive2", "13_lora"), facts("longlive2", "13_lora")
    adapter = lora.from_tensors(wan.weights(case), alpha=said["config"]["alpha"])
    ours = export(lora.merge(wan.longlive2("gen"), adapter), wan_dit.rows(wan.LONGLIVE2))
    theirs = {k.removeprefix("out/merged/"): v for k, v in case.items() if "/merged/" in k}
    assert len(theirs) == 4
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-6, err_msg=name)


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x, text = rng.normal(size=(1, 4, 4, 4, 4)), rng.normal(size=(1, 1, 14, 24))
    return jnp.asarray(x, dtype), jnp.full((1, 1), 500, dtype), jnp.asarray(text, dtype)


def test_gradient_is_of_the_lora_alone():
    """And it is the one that goes through the merged kernels."""

    @functools.partial(streams.jit, static_argnames="way")
    def gradient(dit, adapter, *, way):
        def loss(adapter):
            return jnp.sum(forward(WAYS[way](dit, adapter), *inputs()) ** 2)

        return jax.grad(loss)(adapter)

    ours = gradient(base(), adapter(), way="unmerged")
    assert jax.tree.structure(ours) == jax.tree.structure(adapter())
    for (path, x), y in zip(
        jax.tree.leaves_with_path(ours),
        jax.tree.leaves(gradient(base(), adapter(), way="merged")),
        strict=True,
    ):
        assert np.abs(x).max() > 0, path
        np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max(), err_msg=str(path))


def test_bfloat16():
    """In bfloat16 the LoRA may still be float32; what comes out is near the float32 result."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base())
    out = velocity(lora.apply(half, adapter()), *inputs(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    exact = velocity(lora.merge(base(), adapter()), *inputs())
    far = np.linalg.norm(np.float32(out) - exact) / np.linalg.norm(exact)
    without = velocity(base(), *inputs())
    assert far < 0.03 < np.linalg.norm(without - exact) / np.linalg.norm(exact)
    kernels = weights.flatten(lora.merge(half, adapter()))
    assert all(x.dtype == jnp.bfloat16 for x in kernels.values())


def test_an_adapted_model_is_a_module_like_any_other():
    adapted = lora.apply(base(), adapter())
    flat = weights.flatten(adapted)
    assert isinstance(flat["blocks.ffn_in.kernel"], lora.LowRank)
    again = weights.unflatten(base(), flat)
    for copy in (again, nnx.merge(*nnx.split(adapted)), lora.apply(adapted, adapter())):
        assert jax.tree.structure(copy) == jax.tree.structure(adapted)
        jax.tree.map(np.testing.assert_array_equal, copy, adapted)
    jax.tree.map(np.testing.assert_array_equal, lora.bare(adapted), base())


def test_a_fresh_lora_changes_nothing_and_has_rank_4():
    fresh = lora.init(base(), 4, jax.random.key(0))
    shapes = lambda x: jax.tree.map(jnp.shape, x)  # noqa: E731
    assert shapes(fresh) == shapes(adapter(None))
    assert all(np.std(a) > 0 for a in fresh.a.values())
    merged = lora.merge(base(), fresh)
    jax.tree.map(np.testing.assert_array_equal, merged, base())


def test_lora_256_of_the_full_1_3b():
    """600 tensors, by their shapes alone."""
    cfg = WAN21_T2V_1_3B.dit
    specs = {}
    for row in wan_dit.rows(cfg):
        module = row.source.removesuffix(".weight")
        if row.stacked and row.axes == (1, 0):
            wide = cfg.ffn_dim if module.endswith("ffn.2") else cfg.dim
            tall = cfg.ffn_dim if module.endswith("ffn.0") else cfg.dim
            for i in range(cfg.layers):
                name = f"base_model.model.{module.format(i=i)}"
                for side, shape in (("A", (256, wide)), ("B", (tall, 256))):
                    key = f"{name}.lora_{side}.weight"
                    specs[key] = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert len(specs) == 600
    found = jax.eval_shape(lora.from_tensors, specs)
    assert found.alpha is None and {found.rank(path) for path in found.a} == {256}
    dit = nnx.eval_shape(lambda: DiT(cfg, rngs=nnx.Rngs(0)))
    adapted = lora.apply(dit, found)
    adapted_text = jax.eval_shape(
        lambda dit, text: dit.text_kv(text).k, adapted, jax.ShapeDtypeStruct((1, 1, 8, 4096), "f4")
    )
    assert adapted_text.shape == (30, 1, 1, 8, 12, 128)
    assert weights.flatten(jax.eval_shape(lora.merge, dit, found)) == weights.flatten(dit)


# Names, in and out.


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("naming", ["peft", "diffusers"])
def test_round_trip(tmp_path, naming, dtype):
    """Tensors → ours → a file → ours → tensors, every bit."""
    tensors = {name: x.astype(dtype) for name, x in official().items()}
    lora.save(tmp_path / "lora.safetensors", lora.from_tensors(tensors, alpha=6), naming)
    again = lora.read(tmp_path / "lora.safetensors")
    assert again.alpha == 6
    equal(lora.export(again), tensors)
    equal(lora.export(lora.from_tensors(lora.export(again, naming))), tensors)


def torch_file(path, content):
    torch = parity.needed("torch")
    wrap = lambda x: {k: torch.from_numpy(v) for k, v in x.items()}  # noqa: E731
    torch.save(
        wrap(content)
        if "step" not in content
        else content | {k: wrap(v) for k, v in content.items() if k != "step"},
        path,
    )


def test_longlive_files(tmp_path):
    """A bare dict, or a training checkpoint with the critic's LoRA beside the generator's."""
    tensors = official()
    torch_file(tmp_path / "bare.pt", tensors)
    equal(lora.export(lora.read(tmp_path / "bare.pt")), tensors)
    critic = {name: x + 1 for name, x in tensors.items()}
    both = {"generator_lora": tensors, "critic_lora": critic, "step": 700}
    torch_file(tmp_path / "model.pt", both)
    equal(lora.export(lora.read(tmp_path / "model.pt")), tensors)
    found = lora.read(tmp_path / "model.pt", group="critic_lora", alpha=8)
    equal(lora.export(found), critic)
    assert found.alpha == 8


def spelled(name):
    """The LoRA under names that we read and do not write."""
    for theirs, x in official().items():
        bare = theirs.removeprefix("base_model.model.").removesuffix(".weight")
        module, _, side = bare.rpartition(".")
        direction = {"lora_A": "lora_down", "lora_B": "lora_up"}[side]
        if name == "ComfyUI":
            yield f"diffusion_model.{module}.{side}.weight", x
        elif name == "musubi":
            yield f"lora_unet_{module.replace('.', '_')}.{direction}.weight", x
            yield f"lora_unet_{module.replace('.', '_')}.alpha", np.float32(6)
        elif name == "named adapter":
            yield f"module.base_model.model.{module}.{side}.default.weight", x


@pytest.mark.parametrize(
    ("name", "alpha"), [("ComfyUI", None), ("musubi", 6), ("named adapter", None)]
)
def test_other_spellings(name, alpha):
    found = lora.from_tensors(dict(spelled(name)))
    assert found.alpha == alpha
    equal(lora.export(found), official())


def test_diffusers_names_are_those_of_its_own_converter():
    parity.needed("diffusers")
    from diffusers.loaders import lora_conversion_utils as theirs

    converted = theirs._convert_non_diffusers_wan_lora_to_diffusers(dict(spelled("ComfyUI")))
    equal(lora.export(adapter(), "diffusers"), converted)


# peft and diffusers themselves.


def tiny_wan():
    """A random transformer of diffusers, and ours with its weights."""
    torch, diffusers = parity.needed("torch", "diffusers")
    parity.needed("peft")
    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=128,
        num_layers=2,
        rope_max_seq_len=16,
    ).eval()
    tensors = {name: x.numpy() for name, x in theirs.state_dict().items()}
    abstract = nnx.eval_shape(lambda: DiT(LONGLIVE1, rngs=nnx.Rngs(0)))
    return theirs, fill(abstract, wan_dit.rows_diffusers(LONGLIVE1), tensors)


def same_velocity(theirs, ours):
    import torch

    x, t, text = (np.array(x) for x in inputs())
    with torch.no_grad():
        out = theirs(
            torch.from_numpy(wan.channel_first(x).copy()),
            torch.from_numpy(t[0]),
            torch.from_numpy(text[0]),
            return_dict=False,
        )[0]
    np.testing.assert_allclose(wan.channel_first(velocity(ours, *inputs())), out.numpy(), atol=1e-4)
    return out.numpy()


def test_diffusers_loads_what_we_save_and_we_what_it_saves(tmp_path):
    theirs, dit = tiny_wan()
    without = same_velocity(theirs, dit)
    lora.save(tmp_path / "ours.safetensors", adapter(), "diffusers")
    file = str(tmp_path / "ours.safetensors")
    # Pipelines say so by default; without it the metadata, and alpha with them, are not read.
    theirs.load_lora_adapter(
        file, prefix="transformer", use_safetensors=True, adapter_name="default"
    )
    out = same_velocity(theirs, lora.apply(dit, adapter()))
    assert np.abs(out - without).max() > 0.1
    theirs.save_lora_adapter(tmp_path / "theirs")
    back = lora.read(tmp_path / "theirs")
    assert back.alpha == 6
    equal(lora.export(back), official())


def test_peft_loads_what_we_save_and_we_what_it_saves(tmp_path):
    """`set_peft_model_state_dict`, as LongLive does, and `PeftModel.from_pretrained`."""
    torch, peft = parity.needed("torch", "peft")

    def wan_like():
        block = lambda: torch.nn.ModuleDict(  # noqa: E731
            {
                **{
                    kind: torch.nn.ModuleDict({part: torch.nn.Linear(64, 64) for part in "qkvo"})
                    for kind in ("self_attn", "cross_attn")
                },
                "ffn": torch.nn.Sequential(
                    torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)
                ),
            }
        )
        module = torch.nn.Module()
        module.blocks = torch.nn.ModuleList([block(), block()])
        return module

    torch.manual_seed(0)
    config = peft.LoraConfig(**lora.peft_config(adapter()))
    wrapped = peft.get_peft_model(wan_like(), config)
    state = {name: torch.from_numpy(x.copy()) for name, x in lora.export(adapter()).items()}
    report = peft.set_peft_model_state_dict(wrapped, state)
    assert not report.unexpected_keys
    assert not [name for name in report.missing_keys if "lora_" in name]
    linear = wrapped.base_model.model.blocks[1].ffn[0]
    x = torch.randn(3, 64)
    kernel = jnp.asarray(linear.base_layer.weight.detach().numpy().T)
    path, bias = "blocks.ffn_in", jnp.asarray(linear.base_layer.bias.detach().numpy())
    low = lora.LowRank(kernel, adapter().a[path][1], adapter().b[path][1], adapter().scale(path))
    np.testing.assert_allclose(
        layers.linear(jnp.asarray(x.numpy()), low, bias), linear(x).detach().numpy(), atol=1e-5
    )
    wrapped.save_pretrained(tmp_path / "theirs")
    back = lora.read(tmp_path / "theirs")
    assert back.alpha == 6
    equal(lora.export(back), official())
    lora.save(tmp_path / "ours", back)
    loaded = peft.PeftModel.from_pretrained(wan_like(), tmp_path / "ours")
    equal({k: v.numpy() for k, v in peft.get_peft_model_state_dict(loaded).items()}, official())


# LongLive's file, which does not say alpha.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("alpha", [None, 1, 4, 8])
def test_unscaled_computes_the_same_to_the_bit(alpha, dtype):
    tensors = {name: x.astype(dtype) for name, x in official().items()}
    scaled = lora.from_tensors(tensors, alpha=alpha)
    plain = lora.unscaled(scaled)
    assert {plain.scale(path) for path in plain.a} == {1}
    for way in WAYS.values():
        out, expected = (velocity(way(base(), x), *inputs()) for x in (plain, scaled))
        np.testing.assert_array_equal(out, expected)
    if alpha in (None, 4):
        equal(lora.export(plain), tensors)


def test_what_longlives_file_cannot_say_is_refused():
    with pytest.raises(InputError, match=r"alpha / rank is 1.5: merge it first"):
        lora.unscaled(adapter(6))
    found = adapter(None)
    narrow = {path: x[:, :2] if "ffn" in path else x for path, x in found.a.items()}
    with pytest.raises(InputError, match=r"one rank, not of \[2, 4\]"):
        lora.unscaled(dataclasses.replace(found, a=narrow))
    head = {"head": np.zeros((4, 64), "f4")}, {"head": np.zeros((16, 4), "f4")}
    with pytest.raises(InputError, match="blocks only, not head"):
        lora.unscaled(lora.Lora(*head))


# What is refused.

A0 = "base_model.model.blocks.0.self_attn.q.lora_A.weight"
B0 = A0.replace("lora_A", "lora_B")
A1, B1 = (name.replace("blocks.0", "blocks.1") for name in (A0, B0))
HEAD = "base_model.model.head.head.lora_A.weight"


def changed(**tensors):
    return lambda all_: {k: v for k, v in (all_ | tensors).items() if v is not None}


REFUSED = {
    "A without B": (changed(**{B0: None}), "blocks.0.self_attn.q lacks its B"),
    "a tensor too many": (changed(**{"blocks.0.diff": np.zeros(3)}), "unexpected blocks.0.diff"),
    "an unknown layer": (
        changed(**{HEAD.replace("head", "tail"): np.zeros(3)}),
        "unexpected .*tail",
    ),
    "A and B of other ranks": (
        changed(**{A0: np.zeros((2, 64), "f4"), A1: np.zeros((2, 64), "f4")}),
        "A has rank 2, B has rank 4",
    ),
    "twice": (changed(**{A0.removeprefix("base_model.model."): np.zeros(3)}), "occurs twice"),
    "nothing": (lambda _: {}, "no tensors"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    change, sentence = REFUSED[what]
    with pytest.raises(InputError, match=sentence):
        lora.from_tensors(change(official()))


def test_another_base_is_refused():
    small = dataclasses.replace(LONGLIVE1, ffn_dim=96)
    dit = nnx.eval_shape(lambda: DiT(small, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match="ffn_in is 2 x 64 x 128 there, 2 x 64 x 96 here"):
        lora.apply(dit, adapter())
    deep = nnx.eval_shape(lambda: DiT(dataclasses.replace(LONGLIVE1, layers=3), rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match="is of another model: .* is 2 x .* there, 3 x .* here"):
        lora.apply(deep, adapter())


def test_ranks_may_differ_between_layers(tmp_path):
    tensors = official()
    for name in (A0, A1):
        tensors[name] = tensors[name][:2]
    for name in (B0, B1):
        tensors[name] = tensors[name][:, :2]
    found = lora.from_tensors(tensors)
    assert {found.rank("blocks.self_attn.q"), found.rank("blocks.self_attn.k")} == {2, 4}
    lora.save(tmp_path / "lora.safetensors", found, "diffusers")
    assert lora.read(tmp_path / "lora.safetensors").alpha is None
    assert lora.from_tensors(tensors, alpha=6).scale("blocks.self_attn.q") == 3


# The command.


@pytest.fixture
def tiny_lora(tmp_path):
    dit = models.load("tiny").dit
    fresh = lora.init(dit, 2, jax.random.key(0), alpha=4)
    b = {path: jnp.full_like(x, 0.02) for path, x in fresh.b.items()}
    fresh = dataclasses.replace(fresh, b=b)
    lora.save(tmp_path / "lora.safetensors", fresh)
    return fresh


def test_merge_lora(tmp_path, tiny_lora):
    """The new folder is the old one with the LoRA in it, and of the old one's types."""
    output = tmp_path / "merged"
    arguments = ["--lora", str(tmp_path / "lora.safetensors"), "--output", str(output)]
    assert cli.run(["merge-lora", "--model", "tiny", *arguments]) == 0
    before, after = (weights.read(f, "dit") for f in (folder_of("tiny"), output))
    assert dict(before).keys() == dict(after).keys()
    for path in before:
        old, new = before[path], after[path]
        assert old.dtype == new.dtype
        linear = path.removesuffix(".kernel")
        if linear in tiny_lora.a and path != linear:
            change = 2 * np.einsum("lri,lor->lio", tiny_lora.a[linear], tiny_lora.b[linear])
            expected = (old.astype(np.float32) + change).astype(old.dtype)
            assert (expected != old).any()
            np.testing.assert_allclose(np.float32(new), np.float32(expected), rtol=1e-2, atol=1e-6)
        else:
            np.testing.assert_array_equal(old, new)
    assert {f.name for f in output.iterdir()} == {f.name for f in (folder_of("tiny")).iterdir()}
    assert models.load(str(output)).config == models.load("tiny").config


def test_load_applies_a_lora(tmp_path, tiny_lora):
    adapted = models.load("tiny", lora=tmp_path / "lora.safetensors").dit
    expected = lora.apply(models.load("tiny").dit, tiny_lora)
    jax.tree.map(np.testing.assert_array_equal, adapted, expected)


@pytest.mark.parametrize(
    "why", ["of another model", "is there already", "cut short", "there is no"]
)
def test_merge_lora_writes_nothing_when_it_cannot(tmp_path, capsys, why):
    folder = tmp_path / "models"
    folder.mkdir()
    source, output = folder / "lora.safetensors", folder / "merged"
    lora.save(source, adapter())
    if why == "is there already":
        output.mkdir()
        (output / "mine").touch()
    if why == "cut short":
        source.write_bytes(source.read_bytes()[:-100])
    if why == "there is no":
        source.unlink()
    before = sorted(folder.iterdir())
    arguments = ["--lora", str(source), "--output", str(output)]
    assert cli.run(["merge-lora", "--model", "tiny", *arguments]) == 2
    said = capsys.readouterr().err
    assert why in said and said.count("\n") == 1
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("command", ["bench", "eval", "generate"])
def test_the_flag_reaches_load(tmp_path, command):
    (tmp_path / "lora.safetensors").touch()
    asked = {}

    def load(name, **choices):
        asked.update(choices, name=name)
        raise InputError("enough")

    flags = ["--prompt=a", f"--output={tmp_path}/a.mp4"] if command == "generate" else []
    assert cli.run([command, f"--lora={tmp_path}/lora.safetensors", *flags], load) == 2
    file = lora_files.LoraFile(f"{tmp_path}/lora.safetensors")
    assert asked == {"name": "tiny", "lora": (file,)}
    asked.clear()
    assert cli.run([command, f"--lora={tmp_path}/none.safetensors", *flags], load) == 2
    assert not asked
