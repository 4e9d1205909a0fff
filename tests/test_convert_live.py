"""Files written by diffusers, transformers and PyTorch, converted and run here; and back again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import small_wan
import wan
from test_dit import run as forward

from longlive_jax import config, weights
from longlive_jax.config import SHIPPED
from longlive_jax.convert import run
from longlive_jax.dit import mask
from longlive_jax.text.umt5 import encode
from longlive_jax.vae import vae as vaes

torch, diffusers, transformers = parity.needed("torch", "diffusers", "transformers")

VAES = {
    "2.1": dict(base_dim=4, z_dim=4, num_res_blocks=1),
    "2.2": dict(
        base_dim=4,
        decoder_base_dim=8,
        z_dim=8,
        num_res_blocks=1,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    ),
}


def converted(source, part):
    """A part of a folder, as a module here."""
    to = source.parent / f"{source.name}-ours"
    run.convert([source], to)
    cfg = config.from_json(json.loads((to / "config.json").read_text()))
    module = run.abstract(part, getattr(cfg, part))
    return to, weights.place(module, weights.read(to, part), dtype=jnp.float32)


def state(folder):
    """A safetensors file's tensors, as the library that wrote them reads them."""
    from safetensors.numpy import load_file

    return load_file(next(folder.glob("*.safetensors")))


def back(ours, folder, kind):
    """What diffusers or transformers make of a folder that was written out again."""
    to = ours.parent / "back"
    run.convert([ours], to, layout="diffusers")
    assert small_wan.same(state(to / folder.name), state(folder))
    kind.from_pretrained(to / folder.name)  # it would say so if a name were wrong
    return to


def test_wan_transformer_of_diffusers(tmp_path):
    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=96,
        num_layers=2,
    ).eval()
    theirs.save_pretrained(tmp_path / "transformer")
    ours, dit = converted(tmp_path / "transformer", "dit")
    assert dit.cfg.heads == 2
    random = np.random.default_rng(0)
    x, text = random.normal(size=(2, 4, 3, 6, 4)), random.normal(size=(2, 12, 24))
    t = np.array([900.0, 250.0])
    x, text, t = (a.astype(np.float32) for a in (x, text, t))
    with torch.no_grad():
        want = theirs(*(torch.from_numpy(a) for a in (x, t, text))).sample.numpy()
    kv = wan.prompts(dit, text, 2)
    out = forward(dit, wan.channel_last(x), t[:, None], kv, mask.table(mask.clean(3, 3)))
    np.testing.assert_allclose(wan.channel_first(out), want, rtol=0, atol=1e-4)
    back(ours, tmp_path / "transformer", diffusers.WanTransformer3DModel)


@pytest.mark.parametrize("form", VAES)
def test_wan_vae_of_diffusers(tmp_path, form):
    torch.manual_seed(0)
    latents = VAES[form]["z_dim"]
    statistics = dict(latents_mean=[0.1] * latents, latents_std=[1.5] * latents)
    theirs = diffusers.AutoencoderKLWan(**VAES[form], **statistics).eval()
    theirs.save_pretrained(tmp_path / "vae")
    ours, vae = converted(tmp_path / "vae", "vae")
    assert vae.cfg.shortcut == (form == "2.2") and vae.cfg.mean == (0.1,) * latents
    video = np.random.default_rng(0).uniform(-1, 1, (1, 3, 5, 32, 32)).astype(np.float32)
    with torch.no_grad():
        mean = theirs.encode(torch.from_numpy(video)).latent_dist.mean
        want = theirs.decode(mean).sample.numpy()
    got = jax.jit(vaes.encode)(vae, jnp.asarray(np.moveaxis(video, 1, -1)))
    np.testing.assert_allclose(
        vaes.denormalise(vae.cfg, got), np.moveaxis(mean.numpy(), 1, -1), rtol=0, atol=1e-4
    )
    frames = jax.jit(vaes.decode)(vae, got)
    np.testing.assert_allclose(frames, np.moveaxis(want, 1, -1), rtol=0, atol=1e-4)
    back(ours, tmp_path / "vae", diffusers.AutoencoderKLWan)


def test_umt5_of_transformers(tmp_path):
    torch.manual_seed(0)
    cfg = transformers.UMT5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, dropout_rate=0.0
    )
    theirs = transformers.UMT5EncoderModel(cfg).eval()
    theirs.save_pretrained(tmp_path / "text_encoder")
    ours, umt5 = converted(tmp_path / "text_encoder", "text")
    ids = np.random.default_rng(0).integers(2, 64, (2, 10))
    real = np.arange(10) < np.array([[10], [6]])
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy(real).long())[0]
    got = jax.jit(encode)(umt5, jnp.asarray(ids, jnp.int32), jnp.asarray(real))
    want = want.numpy() * real[..., None]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    back(ours, tmp_path / "text_encoder", transformers.UMT5EncoderModel)


def test_every_layout_and_back_is_exact(tmp_path):
    """Wan's own files, to ours, to diffusers', to ours, and to Wan's again."""
    source = small_wan.write(tmp_path / "wan")
    files = {"vae": "Wan2.1_VAE.pth", "text": "models_t5_umt5-xxl-enc-bf16.pth"}
    for part, name in files.items():
        held = {k: torch.from_numpy(x).bfloat16() for k, x in small_wan.tensors(part).items()}
        torch.save(held, source / name)
    run.convert([source], tmp_path / "pipeline", layout="diffusers")
    run.convert([tmp_path / "pipeline"], tmp_path / "ours")
    run.convert([tmp_path / "ours"], tmp_path / "again", layout="pytorch")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    assert small_wan.same(state(tmp_path / "again"), small_wan.tensors("dit"))
    for name in files.values():
        want, got = (torch.load(tmp_path / f / name) for f in ("wan", "again"))
        assert got.keys() == want.keys()
        assert all(got[k].dtype == x.dtype and torch.equal(got[k], x) for k, x in want.items())
    words = (tmp_path / "again" / "google" / "umt5-xxl" / "tokenizer.json").read_bytes()
    assert words == (SHIPPED / "tiny" / "tokenizer.json").read_bytes()


def test_the_22_vae_to_wan_files_and_back_is_exact(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "vae").mkdir()
    held = small_wan.tensors("vae", "diffusers", cfg=small_wan.VAE22)
    save_file(held, tmp_path / "vae" / "model.safetensors")
    run.convert([tmp_path / "vae"], tmp_path / "wan", layout="pytorch")
    official = torch.load(tmp_path / "wan" / "Wan2.2_VAE.pth")
    wanted = small_wan.tensors("vae", cfg=small_wan.VAE22)
    assert small_wan.same({k: x.numpy() for k, x in official.items()}, wanted)
    run.convert([tmp_path / "wan"], tmp_path / "ours")
    run.convert([tmp_path / "ours"], tmp_path / "back", layout="diffusers")
    assert small_wan.same(state(tmp_path / "back" / "vae"), held)


@pytest.mark.parametrize("ema", [False, True])
def test_a_generator_over_wans_folder(tmp_path, ema):
    """LongLive's container: wrappers around the names, an average beside the weights, and what only
    the training needs.
    """
    source = small_wan.write(tmp_path / "wan")
    plain, average = (small_wan.tensors("dit", seed=seed) for seed in (1, 2))
    wrapped = {
        "generator": {f"model.{k}": torch.from_numpy(x) for k, x in plain.items()},
        "generator_ema": {
            f"model._fsdp_wrapped_module.{k}".replace("blocks.0.", "blocks.0._orig_mod."): (
                torch.from_numpy(x)
            )
            for k, x in average.items()
        },
        "critic": {"model.head.head.bias": torch.zeros(3)},
        "step": 12,
    }
    torch.save(wrapped, tmp_path / "model.pt")
    run.convert([source, tmp_path / "model.pt"], tmp_path / "ours", ema=ema)
    run.convert([tmp_path / "ours"], tmp_path / "back", layout="pytorch")
    assert small_wan.same(state(tmp_path / "back"), average if ema else plain)
