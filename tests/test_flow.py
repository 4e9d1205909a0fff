"""Rectified flow: parity of the tables and of the loss, and the algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax import flow
from longlive_jax.flow import Flow

LOSS_CASES = [
    "05_flow_loss_a_tf",
    "05_flow_loss_b_mask_aug",
    "05_flow_loss_c_i2v",
    "05_flow_loss_d_error_recycling",
]
SHIFTS = st.floats(0.5, 12.0)


def per_frame(x):
    """Golden arrays of single frames (n c h w) as videos of one latent frame."""
    return jnp.asarray(x)[:, None]


def close(actual, wanted, atol, rtol=0.0):
    np.testing.assert_allclose(np.asarray(actual), wanted, atol=atol, rtol=rtol)


@pytest.mark.parametrize("case", ["07_flowmatch"])
def test_table(case, golden, facts):
    array = golden("longlive2", case)
    table = Flow(facts("longlive2", case)["config"]["shift"])
    close(table.sigmas, array["out/sigmas"], 1e-5)
    close(table.timesteps, array["out/timesteps"], 1e-3)
    close(table.weights, array["out/training_weights"], 1e-5)


@pytest.mark.parametrize("shift, at_zero", [(3, 0.002994012), (5, 0.00498008), (8, 0.00794439)])
@pytest.mark.parametrize("case", ["C_causal_inference"])
def test_table_of_1_0(case, shift, at_zero, golden, facts):
    """at_zero: the sigma that the reference uses for timestep 0."""
    array, entry = golden("longlive1", case), facts("longlive1", case)
    table = Flow(float(shift))
    mine = {"sigmas": table.sigmas, "timesteps": table.timesteps, "training_weights": table.weights}
    for name, values in mine.items():
        key = f"out/scheduler_shift{shift}_{name}"
        close(values, array[key], entry["tolerance"][key]["atol"])
    close(table.sigma(jnp.zeros(())), at_zero, 1e-8)


@pytest.mark.parametrize("case", ["07_flowmatch"])
def test_lookups(case, golden, facts):
    """Timesteps between entries, at the ends, and below the last one."""
    array = golden("longlive2", case)
    table = Flow(facts("longlive2", case)["config"]["shift"])
    x, v, noise = (per_frame(array[f"in/{name}"]) for name in ("x", "v", "noise"))
    t = jnp.asarray(array["in/t"])
    close(flow.corrupt(x, noise, table.sigma(t))[:, 0], array["out/add_noise"], 1e-5)
    close(table.training_weight(t), array["out/training_weight_at_t"], 1e-5)
    close(table.to_x0(v, x, t)[:, 0], array["out/flow_to_x0"], 1e-5)
    x0 = jnp.asarray(array["out/flow_to_x0"])[:, None]
    # At t = 0 the difference x - x0 is divided by 0.005, and the rounding of x0 with it.
    close(table.to_velocity(x0, x, t)[:, 0], array["out/x0_to_flow"], 1e-4)


@pytest.mark.parametrize("case", LOSS_CASES)
def test_noise_levels_of_the_loss(case, golden, facts):
    array, config = golden("longlive2", case), facts("longlive2", case)["config"]
    table, chunk = Flow(5.0), config["num_frame_per_block"]
    index = np.repeat(array["in/draw_01_randint"][:, ::chunk], chunk, 1)
    image = bool(config.get("i2v"))  # the first frame is then given, at timestep 0
    t = np.asarray(table.timestep(jnp.asarray(index)))
    close(t[:, image:], array["out/timestep"][:, image:], 1e-3)
    t = jnp.asarray(array["out/timestep"])
    close(table.training_weight(t), array["out/training_weight"], 1e-5)
    clean, noise = with_errors(array, chunk)
    noisy = flow.corrupt(jnp.asarray(clean), jnp.asarray(noise), table.sigma(t))
    close(noisy[:, image:], array["out/noisy_latents"][:, image:], 1e-5)
    x, v = jnp.asarray(array["out/noisy_latents"]), jnp.asarray(array["out/flow_pred"])
    close(table.to_x0(v, x, t), array["out/x0_pred"], 1e-5)
    assert np.asarray(table.sigma(t)).min() > 0


@pytest.mark.parametrize("case", ["05_flow_loss_b_mask_aug", "05_flow_loss_c_i2v"])
def test_noised_context(case, golden, facts):
    """The context takes the same noise, at one of the noisiest levels of the table."""
    array, config = golden("longlive2", case), facts("longlive2", case)["config"]
    table, chunk = Flow(5.0), config["num_frame_per_block"]
    index = np.repeat(array["in/draw_02_randint"][:, ::chunk], chunk, 1)
    t = table.timestep(jnp.asarray(index))
    clean, noise = (
        jnp.asarray(array["in/clean_latent"]),
        jnp.asarray(array["in/draw_00_randn_like"]),
    )
    context = flow.corrupt(clean, noise, table.sigma(t))
    image = bool(config.get("i2v"))
    close(t[:, image:], array["out/aug_t_given_to_model"][:, image:], 1e-3)
    close(context[:, image:], array["out/clean_x_given_to_model"][:, image:], 1e-5)


@pytest.mark.parametrize("case", LOSS_CASES)
def test_loss(case, golden, facts):
    """The recorded prediction gives the recorded loss."""
    array, config = golden("longlive2", case), facts("longlive2", case)["config"]
    _, noise = with_errors(array, config["num_frame_per_block"])
    target = flow.target(jnp.asarray(array["in/clean_latent"]), jnp.asarray(noise))
    mask = array.get("in/loss_mask")
    if config.get("i2v"):  # the given frame is not learned
        target = target.at[:, 0].set(0.0)
        mask = np.concatenate([0 * mask[:, :1], mask[:, 1:]], 1)
    weight = Flow(5.0).training_weight(jnp.asarray(array["out/timestep"]))
    mask = None if mask is None else jnp.asarray(mask)
    loss = flow.velocity_loss(jnp.asarray(array["out/flow_pred"]), target, weight, mask)
    close(loss, array["out/loss"][0], 0.0, rtol=1e-5)


def with_errors(array, chunk):
    """Clean latents and noise as the model's input mixes them: with the recorded errors, if any."""
    clean, noise = array["in/clean_latent"], array["in/draw_00_randn_like"]
    if "in/error_entry" not in array:
        return clean, noise
    tiles = (1, clean.shape[1] // chunk, 1, 1, 1)
    repeat = lambda name: np.tile(array[name][None], tiles)  # noqa: E731
    return clean + repeat("in/error_entry"), noise + repeat("in/noise_error_entry")


@given(u=st.floats(0.0, 1.0), s=SHIFTS)
def test_shift_inverts(u, s):
    assert flow.unshift(flow.shift(u, s), s) == pytest.approx(u, abs=1e-12)
    assert flow.shift(0.0, s) == 0.0
    assert flow.shift(1.0, s) == pytest.approx(1.0)


@given(s=SHIFTS)
@settings(deadline=None, max_examples=20)
def test_table_is_ordered(s):
    table = Flow(s)
    assert np.all(np.diff(table.sigmas) < 0) and table.sigmas[0] == pytest.approx(1.0)
    assert table.weights.min() == 0 and table.weights.mean() == pytest.approx(1.0)
    index = jnp.arange(1000)
    np.testing.assert_array_equal(table.index(table.timestep(index)), index)


@given(index=st.integers(0, 999), s=SHIFTS, seed=st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=10)
def test_corrupt_and_back(index, s, seed):
    """The true velocity leads from every noise level to the clean video, and the reverse."""
    keys = jax.random.split(jax.random.key(seed))
    clean, noise = (jax.random.normal(key, (2, 3, 2, 2, 4)) for key in keys)
    table = Flow(s)
    t = jnp.full((2, 3), table.timestep(jnp.asarray(index)))
    x = flow.corrupt(clean, noise, table.sigma(t))
    v = flow.target(clean, noise)
    close(table.to_x0(v, x, t), clean, 1e-5)
    close(table.to_velocity(clean, x, t), v, 1e-5 / float(table.sigma(t).min()))


@pytest.mark.parametrize("lengths, stop", [((4, 4, 4), 1000), ((1, 8, 8), 1000), ((2,), 60)])
def test_one_level_per_chunk(lengths, stop):
    index = flow.sample_index(jax.random.key(0), 64, lengths, stop=stop)
    assert index.shape == (64, sum(lengths))
    chunks = np.split(np.asarray(index), np.cumsum(lengths)[:-1], axis=1)
    assert all(np.all(chunk == chunk[:, :1]) for chunk in chunks)
    assert 0 <= int(index.min()) and stop * 0.8 < int(index.max()) < stop
    firsts = {tuple(chunk[:, 0]) for chunk in chunks}
    assert len(firsts) == len(chunks)  # chunks are independent


def test_bfloat16_stays_outside():
    """Low-precision videos keep their dtype; the arithmetic is float32."""
    clean, noise = (jnp.full((1, 1, 1, 1, 1), x, jnp.bfloat16) for x in (1.0, -3.0))
    t = jnp.full((1, 1), 625.0)
    x = flow.corrupt(clean, noise, Flow(5.0).sigma(t))
    assert x.dtype == jnp.bfloat16 and float(x[0, 0, 0, 0, 0]) == -1.5
    assert Flow(5.0).to_x0(noise - clean, x, t).dtype == jnp.bfloat16
    assert Flow(5.0).to_x0(noise - clean, x, t) == clean
    ones = jnp.ones((1, 1))
    assert flow.velocity_loss(x, clean, ones).dtype == jnp.float32


def test_empty_mask_gives_no_loss():
    v = jnp.ones((1, 2, 1, 1, 1))
    assert flow.velocity_loss(v, -v, jnp.ones((1, 2)), jnp.zeros((1, 2))) == 0
    assert flow.velocity_loss(v, -v, jnp.ones((1, 2)), jnp.asarray([[True, False]])) == 4
