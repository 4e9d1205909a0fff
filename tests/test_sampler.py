"""Samplers: parity with recorded trajectories, and fields with a known answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax import flow, sampler
from longlive_jax.config import SamplerConfig

UNIPC_KEPT = {50: [0, 1, 2, 3, 10, 25, 40, 48, 49, 50]}  # entries of the 50-step trajectory on file
SHAPE = (1, 2, 2, 2, 3)


def config(solver, steps=4, shift=5.0, **more):
    return SamplerConfig(solver=solver, steps=steps, shift=shift, **more)


def never(step):
    raise AssertionError("this solver asks for no noise")


def trajectory(solver, velocity, noise, renoise=never):
    """The points the model was asked at, and the result: n + 1. velocity: (x, t, step) -> v."""

    def recording(x, t, state):
        step, seen = state
        return velocity(x, t, step), (step + 1, seen.at[step].set(x))

    @jax.jit
    def run(noise):
        seen = jnp.zeros((len(solver.steps), *noise.shape))
        start = (jnp.int32(0), seen)
        x0, (_, seen) = sampler.sample_stateful(solver, recording, noise, renoise, start)
        return jnp.concatenate([seen, x0[None]])

    return np.asarray(run(jnp.asarray(noise)))


@pytest.mark.parametrize(
    ("name", "steps"), [*(("unipc", n) for n in (2, 4, 8, 50)), *(("dpmpp", n) for n in (4, 20))]
)
def test_multistep(name, steps, golden, facts):
    case = f"07_{name}"
    array, entry = golden("longlive2", case), facts("longlive2", case)["config"]
    solver = sampler.make(config(name, steps, entry["shift"]))
    told = np.asarray([step.timestep for step in solver.steps])
    np.testing.assert_array_equal(told, array[f"out/timesteps_{steps}"])
    sigmas = [step.sigma for step in solver.steps] + [0.0]
    np.testing.assert_allclose(sigmas, array[f"out/sigmas_{steps}"], atol=1e-6, rtol=0)

    def velocity(x, t, step):
        return jnp.tanh(entry["a"] * x + entry["b"] * t / 1000.0)

    mine = trajectory(solver, velocity, array["in/x"])[UNIPC_KEPT.get(steps, slice(None))]
    np.testing.assert_allclose(mine, array[f"out/traj_{steps}"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("run", ["", "global_", "inf_"])
@pytest.mark.parametrize("case", ["C_causal_inference"])
def test_renoise(case, run, golden, facts):
    """A recorded video: a model that answers as recorded is shown the recorded inputs."""
    array, entry = golden("longlive1", case), facts("longlive1", case)
    settings_ = entry["config"]
    timesteps = tuple(settings_["denoising_step_list"])
    cfg = config("renoise", len(timesteps), settings_["timestep_shift"], timesteps=timesteps)
    solver, chunk = sampler.make(cfg), settings_["num_frame_per_block"]
    told = np.asarray([step.timestep for step in solver.steps])
    key = f"out/{run}denoising_step_list"
    np.testing.assert_allclose(told, array[key], atol=entry["tolerance"][key]["atol"], rtol=0)
    asked = [call["t"] for call in settings_[f"calls_{run}".rstrip("_")][: len(told)]]
    np.testing.assert_allclose(told, asked, atol=1e-4, rtol=0)
    atol = entry["tolerance"][f"out/{run}trace_x"]["atol"]
    sigmas = jnp.asarray([step.sigma for step in solver.steps], jnp.float32)

    def per_step(name, calls):
        """Records in call order as steps, chunks (a batch), f c h w; clean passes left out."""
        steps = array[name].reshape(-1, calls, *array[name].shape[1:])
        steps = np.moveaxis(steps, 1, 0)[: len(told)]
        return steps.reshape(len(steps), -1, chunk, *array[name].shape[-3:])

    def per_chunk(name):
        video = array[name]
        split = video.reshape(len(video), -1, chunk, *video.shape[2:])
        return np.moveaxis(split, 1, 0).reshape(-1, chunk, *video.shape[2:])

    x0 = jnp.asarray(per_step(f"out/{run}trace_x0", len(told) + 1))
    draws = jnp.asarray(per_step(f"in/{run}renoise", len(told) - 1))
    mine = trajectory(
        solver,
        lambda x, t, step: (x - x0[step]) / sigmas[step],
        per_chunk(f"in/{run}noise"),
        lambda step: draws[step - 1],
    )
    wanted = per_step(f"out/{run}trace_x", len(told) + 1)
    np.testing.assert_allclose(mine[:-1], wanted, atol=atol, rtol=0)
    result = per_chunk(f"out/{run}latents")
    np.testing.assert_allclose(mine[-1], result, atol=atol, rtol=0)


@pytest.mark.parametrize("case", ["07_flowmatch"])
def test_euler(case, golden, facts):
    """The grid, and single steps from entries of the training table."""
    array, shift = golden("longlive2", case), facts("longlive2", case)["config"]["shift"]
    solver = sampler.make(config("euler", 8, shift))
    sigmas, told = zip(*((step.sigma, step.timestep) for step in solver.steps), strict=True)
    np.testing.assert_allclose(sigmas, array["out/sigmas_8steps"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(told, array["out/timesteps_8steps"], atol=1e-3, rtol=0)
    table = flow.Flow(shift)
    x, v, t = (array[f"in/{name}"] for name in ("x", "v", "t"))
    for name, last in {"step_first4": False, "step_to_final": True}.items():
        for i, wanted in enumerate(array[f"out/{name}"]):
            here = int(table.index(jnp.asarray(t[i])))
            after = 0.0 if last else table.sigmas[here + 1]
            keep, move, *_ = sampler._line(table.sigmas[here], after)
            mine = keep * x[i] + move * (x[i] - table.sigmas[here] * v[i])
            np.testing.assert_allclose(mine, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["07_flowmatch"])
def test_default_timesteps(case, golden):
    """Without a list, timesteps are evenly spaced: the released list at 4 steps."""
    array = golden("longlive2", case)
    listed = sampler.make(config("renoise", timesteps=(1000, 750, 500, 250)))
    told = [step.timestep for step in listed.steps]
    np.testing.assert_allclose(told, array["out/warped_1000_750_500_250"], atol=1e-3, rtol=0)
    assert sampler.make(config("renoise")) == listed
    for steps in (2, 4):
        grid = sampler.make(config("euler", steps)).steps
        whole = array[f"out/default_denoising_step_list_{steps}"][:-1]
        np.testing.assert_array_equal(np.trunc([step.timestep for step in grid]), whole)


def test_unwarped_timesteps():
    """The model is told the list itself; the noise level is the table's nearest."""
    solver = sampler.make(config("renoise", 2, timesteps=(1000, 500), warp=False))
    assert [step.timestep for step in solver.steps] == [1000.0, 500.0]
    assert solver.steps[1].sigma == pytest.approx(0.5, abs=1e-3)
    assert solver.steps[0].predict == (0.0, 1.0 - solver.steps[1].sigma, 0.0, solver.steps[1].sigma)


@given(
    solver=st.sampled_from(["unipc", "dpmpp", "euler"]),
    steps=st.integers(1, 40),
    shift=st.floats(1.0, 10.0),
    seed=st.integers(0, 2**31 - 1),
)
@settings(deadline=None, max_examples=12)
def test_exact_on_constant_velocity(solver, steps, shift, seed):
    solver = sampler.make(config(solver, steps, shift))
    noise, v = (jax.random.normal(key, SHAPE) for key in jax.random.split(jax.random.key(seed)))
    x0 = sampler.sample(solver, lambda x, t: v, noise, never)
    np.testing.assert_allclose(x0, noise - solver.steps[0].sigma * v, atol=2e-5, rtol=0)


@given(solver=st.sampled_from(["unipc", "dpmpp", "euler", "renoise"]), steps=st.integers(1, 60))
@settings(deadline=None, max_examples=40)
def test_steps_are_affine(solver, steps):
    """Weights sum to 1: where all points agree, a step stays there."""
    for step in sampler.make(config(solver, steps)).steps:
        assert sum(step.correct) == pytest.approx(1.0)
        assert sum(step.predict) == pytest.approx(1.0)
        assert np.isfinite([*step.correct, *step.predict]).all()
        assert 0 < step.sigma <= 1 and 0 <= step.timestep <= 1000


def error(name, steps, **more):
    """How far a solver ends from the closed form of dx / dsigma = x²."""
    noise = jnp.linspace(0.5, 2.0, 24).reshape(SHAPE)
    solver = sampler.make(config(name, steps, **more))
    x0 = sampler.sample(solver, lambda x, t: x**2, noise, never)
    exact = np.asarray(noise) / (1.0 + solver.steps[0].sigma * np.asarray(noise))
    return np.abs(np.asarray(x0) - exact).max()


def test_converges_on_a_nonlinear_ode():
    """Euler converges linearly, UniPC well ahead of it."""
    unipc = [error("unipc", n) for n in (8, 16, 32)]
    euler = [error("euler", n) for n in (8, 16, 32)]
    assert all(before > 4 * after for before, after in zip(unipc, unipc[1:], strict=False)), unipc
    assert all(1.6 < before / after < 2.6 for before, after in zip(euler, euler[1:], strict=False))
    assert unipc[-1] < euler[-1] / 15 < 2e-3, (unipc, euler)


def test_dpmpp_is_of_second_order():
    """Up to a logarithm: towards sigma = 0, log-SNR spans do not shrink with the number of steps.

    Without a shift; at 5 the error crosses zero near 32 steps.
    """
    errors = [error("dpmpp", n, shift=1.0) for n in (8, 16, 32, 64)]
    assert all(before > 2.8 * after for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < error("euler", 64, shift=1.0) / 50 < 2e-4, errors


def test_renoise_is_a_function_of_key_chunk_and_step():
    solver = sampler.make(config("renoise"))
    noise = jax.random.normal(jax.random.key(1), SHAPE)

    @jax.jit
    def run(seed, chunk):
        renoise = sampler.draws(jax.random.key(seed), chunk, SHAPE)
        return sampler.sample(solver, lambda x, t: x * 0.5, noise, renoise)

    first = run(7, 3)
    other = [run(7, 4), run(8, 3)]
    np.testing.assert_array_equal(run(7, 3), first)
    assert all(np.abs(np.asarray(x - first)).max() > 0.1 for x in other)
    draw = sampler.draws(jax.random.key(7), 3, SHAPE)
    later, earlier = draw(2), draw(1)
    np.testing.assert_array_equal(draw(1), earlier)
    assert np.abs(np.asarray(later - earlier)).max() > 0.1


def test_renoise_draws_only_between_steps():
    """Every level gets its own step's noise, and nothing is added to the result."""
    solver = sampler.make(config("renoise"))
    levels = jnp.asarray([jnp.nan, 1.0, 10.0, 100.0])
    seen = trajectory(
        solver, lambda x, t, step: x / 1e9, jnp.ones(SHAPE), lambda s: jnp.full(SHAPE, levels[s])
    )
    x = 1.0
    for step, level, before in zip(solver.steps[1:], levels[1:], seen[1:], strict=False):
        x = (1 - step.sigma) * x + step.sigma * float(level)
        np.testing.assert_allclose(before, x, rtol=1e-5)
    np.testing.assert_allclose(seen[-1], x, rtol=1e-5)


@pytest.mark.parametrize("name", ["unipc", "dpmpp", "renoise"])
def test_one_evaluation_per_step(name):
    """The model is traced once, sees scalar float32 timesteps and the dtype of the noise."""
    traced = []

    def velocity(x, t):
        traced.append((x.dtype, t.dtype, t.shape))
        return x

    solver = sampler.make(config(name, 12))
    noise = jnp.ones(SHAPE, jnp.bfloat16)
    renoise = sampler.draws(jax.random.key(0), 0, SHAPE)
    x0 = jax.jit(lambda x: sampler.sample(solver, velocity, x, renoise))(noise)
    assert traced == [(jnp.bfloat16, jnp.float32, ())] and x0.dtype == jnp.bfloat16


def test_guidance():
    x, t = jnp.full(SHAPE, 2.0), jnp.float32(500.0)
    cond, uncond = lambda x, t: 3.0 * x, lambda x, t: x
    np.testing.assert_allclose(sampler.guided(cond, uncond, 3.0)(x, t), 2.0 + 3.0 * (6.0 - 2.0))

    def never_called(x, t):
        raise AssertionError("no negative branch at guidance 1")

    np.testing.assert_array_equal(sampler.guided(cond, never_called, 1.0)(x, t), 6.0)


@pytest.mark.parametrize(
    "cfg, words",
    [
        (config("ddim"), "choose one of dpmpp, euler, renoise, unipc"),
        (config("unipc", 0), "at least 1 step"),
        (config("unipc", timesteps=(1000, 750, 500, 250)), "places its own"),
        (config("renoise", 3, timesteps=(1000, 500)), "2 timesteps are listed for 3 steps"),
        (config("renoise", 2, timesteps=(500, 1000)), "must fall"),
        (config("renoise", 2, timesteps=(1001, 500)), "must fall"),
        (config("renoise", 2, timesteps=(1000, 0)), "must fall"),
    ],
)
def test_impossible_configs(cfg, words):
    with pytest.raises(ValueError, match=words):
        sampler.make(cfg)


def test_guidance_needs_a_second_branch_only_off_1():
    assert config("unipc").branches == 1
    assert config("unipc", guidance=3.0).branches == 2
