"""The teacher-forcing loss through the whole model, and its gradients, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wan

from longlive_jax import flow, weights
from longlive_jax.convert import wan_dit
from longlive_jax.convert.table import export
from longlive_jax.dit import mask
from longlive_jax.dit.attention import masked
from longlive_jax.dit.model import TextKV
from longlive_jax.dit.rope import phases

FRAMES = 6
TABLE = mask.table(mask.teacher_forcing(mask.clean(FRAMES, 2)))


def frames_last(x):
    """b f c h w -> b f h w c."""
    return jnp.asarray(np.moveaxis(x, 2, -1))


@jax.jit
def loss_and_gradients(flat, noisy, clean, t, aug_t, context, target, keep):
    abstract = wan.longlive2("gen")

    def loss(flat):
        dit = weights.unflatten(abstract, flat)
        text = dit.text_kv(context)
        text = TextKV(*(jnp.concatenate([x, x], 2) for x in (text.k, text.v)))
        position = jnp.tile(jnp.arange(FRAMES, dtype=jnp.float32), (2, 2))
        attn = masked(TABLE, phases(dit.cfg, position, 2, 2))
        both = jnp.concatenate([clean, noisy], 1)
        v = dit(both, jnp.concatenate([aug_t, t], 1), text, attn)[0][:, FRAMES:]
        return flow.velocity_loss(v, target, flow.Flow(5.0).training_weight(t), keep), v

    return jax.value_and_grad(loss, has_aux=True)(flat)


@pytest.mark.parametrize(
    "name",
    [
        "05_flow_loss_a_tf",
        "05_flow_loss_b_mask_aug",
        "05_flow_loss_c_i2v",
        "05_flow_loss_d_error_recycling",
    ],
)
def test_loss_and_gradients(golden, name):
    case, dit = golden("longlive2", name), wan.longlive2("gen")
    noise = case["in/draw_00_randn_like"]
    if "in/noise_error_entry" in case:  # one recycled error per chunk of two frames
        noise = noise + np.tile(case["in/noise_error_entry"], (3, 1, 1, 1))
    target = noise - case["in/clean_latent"]
    if "in/initial_latent" in case:
        target[:, 0] = 0
    t = jnp.asarray(case["out/timestep"])
    aug_t = jnp.asarray(case.get("out/aug_t_given_to_model", np.zeros_like(t)))
    context = case["in/prompt_embeds"]
    (loss, v), gradients = loss_and_gradients(
        weights.flatten(dit),
        frames_last(case["out/noisy_latents"]),
        frames_last(case["out/clean_x_given_to_model"]),
        t,
        aug_t,
        jnp.asarray(context.reshape(2, -1, *context.shape[1:])),
        frames_last(target),
        jnp.asarray(case.get("in/loss_mask", np.ones_like(t))),
    )
    np.testing.assert_allclose(v, frames_last(case["out/flow_pred"]), atol=1e-4)
    np.testing.assert_allclose(loss, case["out/loss"][0], rtol=1e-5)
    ours = export(weights.unflatten(dit, gradients), wan_dit.rows(dit.cfg))
    expected = {k.removeprefix("out/grad/"): g for k, g in case.items() if "/grad/" in k}
    assert len(expected) == 8
    for parameter, gradient in expected.items():
        np.testing.assert_allclose(
            ours[parameter],
            gradient,
            rtol=0,
            atol=1e-4 * np.abs(gradient).max() + 1e-6,
            err_msg=parameter,
        )
