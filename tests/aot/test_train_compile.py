"""Plans of training beside the compiler's own account, for GPUs that are not there.

Needs the [aot] extra. What `train.plan.formula` says without a compiler must be near it.
"""

import dataclasses

import jax
import pytest

from longlive_jax import footprint
from longlive_jax.train import plan
from longlive_jax.train.plan import Ask

pytestmark = pytest.mark.aot

ACTIVATIONS, EXCHANGE = 1.3, 1.001  # the factors by which the formula may be off


@pytest.fixture(autouse=True)
def compiler():
    if not footprint.toolchain():
        pytest.skip("needs the [aot] extra")
    # As for users.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def tiny():
    return plan.make(Ask("tiny", 16.0, mesh="1x8", source="compiled").check())


def test_the_formula_agrees_with_the_compiler(tiny):
    formula = plan.make(dataclasses.replace(tiny.ask, source="formula"))
    assert (tiny.source, formula.source) == ("compiled", "formula")
    ratio = formula.memory.activations / tiny.memory.activations
    assert 1 / ACTIVATIONS < ratio < ACTIVATIONS
    sent, expected = tiny.step.collectives, formula.step.collectives
    # Where a weight is smaller than what would be gathered of it, XLA moves tokens instead.
    assert sent["all-to-all"] == pytest.approx(expected["all-to-all"], rel=0.2)
    total = lambda step: sum(step.values())  # noqa: E731
    assert total(sent) == pytest.approx(total(expected), rel=0.5)
    assert tiny.work == formula.work and tiny.fits


def test_the_arguments_are_what_the_plan_counts(tiny):
    mesh = plan.devices(plan.gpus.find("h100"), (1, 8))
    with jax.numpy_dtype_promotion("standard"):
        memory = plan.lower(tiny.ask, mesh).compile().memory_analysis()
    held = tiny.memory.peak - tiny.memory.activations
    assert memory.argument_size_in_bytes == pytest.approx(held, rel=EXCHANGE - 1)


def test_plain_sp_moves_latents_and_velocities(tiny):
    cfg, n = tiny.ask.config, tiny.ask.length
    numbers = n * cfg.latent_height * cfg.latent_width * cfg.dit.channels // 8
    assert tiny.plain_moves > 3 * 4 * numbers


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["h100", "b200"])
def test_a_minute_of_the_5b_on_eight_devices(gpu):
    """Weights and sequence spread over the eight: it fits on H100s too."""
    ask = Ask("wan22_5b", 64.0, gpu=gpu, mesh="1x8").check()
    step, formula = plan.compiled(ask), plan.formula(ask)
    assert step.activations == pytest.approx(formula.activations, rel=ACTIVATIONS - 1)
    memory = plan.resident(ask, step.activations)
    assert plan.advise(ask, memory).startswith("Fits")
    assert step.collectives["all-to-all"] == pytest.approx(
        formula.collectives["all-to-all"], rel=0.01
    )
