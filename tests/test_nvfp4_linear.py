"""Products of NVFP4 matrices, and the linear layer that trains with them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from longlive_kernels.nvfp4 import NVFP4
from longlive_kernels.nvfp4.format import swizzle
from longlive_kernels.nvfp4.linear import AR, DMD, Recipe, linear, vjp
from longlive_kernels.nvfp4.linear.recipe import Chance
from longlive_kernels.nvfp4.matmul import matmul, matmul_w4a16, shapes
from longlive_kernels.nvfp4.quantize import quantize
from test_nvfp4_quantize import (
    SIGNS,
    bfloat16,
    mesh,
    normal,
    numbers,
    quantized,
    same,
    scale_bytes,
    sha1,
    uniform,
)

NEAREST = Recipe(stochastic=False)
CASES = {
    "train_ar_nearest": NEAREST,
    "train_dmd_nearest": Recipe(weights="mse", stochastic=False),
    "w1d_nearest": Recipe("static_6", "static_6", "static_6", tile=1, stochastic=False),
}
layer = jax.jit(linear, static_argnames="recipe")
product = jax.jit(matmul, static_argnames=("dtype", "implementation"))
mixed = jax.jit(matmul_w4a16, static_argnames=("dtype", "implementation"))


def float64(q: NVFP4) -> np.ndarray:
    return np.asarray(numbers(q), np.float64)


def close_bfloat16(ours, theirs):
    """Equal to one bfloat16 unit (2^-7 at most) if that is the type, and to 2e-5 of the largest,
    which is what sums in float32 may differ by. That it shows in bfloat16 is rare.
    """
    kind = ours.dtype
    ours, theirs = (np.asarray(x).astype(np.float32) for x in (ours, theirs))
    rtol = 2**-7 if kind == jnp.bfloat16 else 0
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=2e-5 * np.abs(theirs).max())
    if kind == jnp.bfloat16:
        assert (ours != theirs).mean() < 2e-3


@pytest.mark.parametrize("rule", ["static_6", "mse"])
def test_products_are_those_of_the_reference(golden, rule):
    case = golden("longlive2", "11_fp4_matmul")
    a, b = (quantized(bfloat16(case[f"in/{x}"]), rule=rule, amax=case[f"amax/{x}"]) for x in "ab")
    want = case[f"out/{rule}_float32"]
    np.testing.assert_allclose(product(a, b, dtype=jnp.float32), want, rtol=0, atol=1e-4)
    close_bfloat16(product(a, b), bfloat16(case[f"out/{rule}_bfloat16"]))


def operands(shape: shapes.Shape) -> tuple[NVFP4, NVFP4]:
    return quantized(normal(shape.a), rule="mse"), quantized(normal(shape.b, 1), rule="static_6")


@pytest.mark.parametrize("name", ["tiny_square", *shapes.AWKWARD])
def test_products_are_exact(name):
    """Against float64, to rounding of float32 sums."""
    shape = shapes.SHAPES[name].capped(96) if name != "long_sum" else shapes.SHAPES[name]
    a, b = operands(shape)
    want, scale = float64(a) @ float64(b).swapaxes(-1, -2), np.sqrt(shape.k)
    np.testing.assert_allclose(product(a, b, dtype=jnp.float32), want, rtol=0, atol=2e-6 * scale)
    assert product(a, b).dtype == jnp.bfloat16
    if shape.batch:
        return
    x = normal(shape.a, dtype=jnp.bfloat16)
    want = np.asarray(x, np.float64) @ float64(b).T
    got = mixed(x, b, dtype=jnp.float32)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * scale)
    assert mixed(x, b).dtype == jnp.bfloat16
    np.testing.assert_array_equal(mixed(x[None], b)[0], mixed(x, b))


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_shapes(name):
    shape = shapes.SHAPES[name]
    sides = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in (shape.a, shape.b))
    found = jax.eval_shape(lambda a, b: matmul(quantize(a), quantize(b)), *sides)
    assert found.shape == (*shape.batch, shape.m, shape.n)


def test_a_wrong_order_of_scales_is_caught():
    """Swizzled scales that are read as row-major change a product by more than any rounding."""
    a, b = operands(shapes.Shape(16, 128, 64))
    swapped = NVFP4(b.packed, swizzle(b.scales).reshape(b.scales.shape), b.amax, b.rule)
    right, wrong = (np.asarray(product(a, x, dtype=jnp.float32)) for x in (b, swapped))
    assert np.abs(wrong - right).max() > 0.05 * np.abs(right).max()
    with pytest.raises(AssertionError):
        close_bfloat16(product(a, swapped), product(a, b))


def test_a_backend_is_named_or_chosen():
    a, b = operands(shapes.AWKWARD["one_block"])
    np.testing.assert_array_equal(matmul(a, b), matmul(a, b, implementation="xla"))
    for call in (matmul, matmul_w4a16):
        left = a if call is matmul else normal((16, 16))
        with pytest.raises(NotImplementedError, match="no backend 'tpu': there are"):
            call(left, b, implementation="tpu")
    other = quantized(normal((16, 32)))
    with pytest.raises(ValueError, match=re.escape("no product of (16, 16) and (16, 32)")):
        matmul(a, other)
    with pytest.raises(ValueError, match=re.escape("no product of (2, 32) and (16, 16)")):
        matmul_w4a16(normal((2, 32)), b)


@functools.partial(jax.jit, static_argnames="recipe")
def everything(x, kernel, grad, chance: dict, recipe: Recipe):
    """The six operands in the order in which the reference quantises them, and the results."""
    chance = Chance(**chance)
    saved, weights = vjp.fprop(x, kernel, recipe)
    g, transposed = vjp.dgrad(kernel, grad, chance, recipe)
    x2, g2 = vjp.wgrad(saved, grad, chance, recipe)
    y = matmul(saved, weights, dtype=x.dtype)
    quantised = (weights, saved, g, transposed, g2, x2)
    return quantised, y, vjp.gradients(saved, kernel, grad, chance, recipe)


def signs_of_the_reference(golden):
    signs = golden("longlive2", "11_nvfp4_transpose_hadamard")["signs"]
    return jnp.asarray(signs, jnp.float32)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_layer_of_the_reference(golden, facts, name):
    """Operands to the byte, products to one bfloat16 unit."""
    name, recipe = f"11_fp4_linear_{name}", CASES[name]
    case, sums = golden("longlive2", name), facts("longlive2", name)["sha1"]
    stored = {k: jnp.asarray(bfloat16(v)) for k, v in case.items()}
    x = stored["in/x"].reshape(-1, 128)
    grad = stored["in/grad_output"].reshape(-1, 256)
    kernel = stored["w/weight"].astype(jnp.float32).T  # k n
    chance = dict(signs=signs_of_the_reference(golden))
    quantised, y, (dx, dkernel) = everything(x, kernel, grad, chance, recipe)
    found = {}
    for i, q in enumerate(quantised):
        flat = np.asarray(swizzle(q.scales)).view(np.uint8)
        parts = dict(packed=q.packed, scales=scale_bytes(q), scales_blocked=flat)
        found |= {f"quant{i}/{k}": sha1(v) for k, v in parts.items()}
    assert {k: found[k] for k in sums} == sums
    assert len(sums) == 12
    got = dict(y=y + stored["w/bias"], grad_x=dx, grad_weight=dkernel.T.astype(jnp.bfloat16))
    for key, ours in got.items():
        if f"out/{key}" in stored:
            theirs = stored[f"out/{key}"]
            close_bfloat16(ours[:: len(ours) // len(theirs)], theirs)


def test_the_gradient_of_a_bias_is_not_quantised(golden):
    """Of the bias that a caller adds. The reference rounds sums over samples, then the sum of those
    over tokens, to bfloat16: half a unit each.
    """
    case = golden("longlive2", "11_fp4_linear_train_ar_nearest")
    x, grad, want = (
        jnp.asarray(bfloat16(case[k])).astype(jnp.float32)
        for k in ("in/x", "in/grad_output", "out/grad_bias")
    )
    add = lambda b: layer(x, jnp.zeros((128, 256)), jax.random.key(0), NEAREST) + b  # noqa: E731
    (found,) = jax.vjp(add, jnp.zeros(256))[1](grad)
    limit = 2**-9 * (np.abs(grad.sum(0)).sum(0) + np.abs(want[0]))
    assert (np.abs(found - want[0]) <= limit).all()


def test_draws_go_where_those_of_the_reference_go(golden):
    name = "11_fp4_linear_train_ar_stochastic"
    case = golden("longlive2", name)
    grad = jnp.asarray(bfloat16(case["in/grad_output"]))
    draws = {k: dict(draws=uniform(case[f"in/{k}_draws"])) for k in ("dgrad", "wgrad")}
    chance = dict(signs=signs_of_the_reference(golden), **draws)
    tokens, n = grad.shape
    x = jnp.zeros((tokens, 16), jnp.bfloat16)
    quantised, *_ = everything(x, jnp.zeros((16, n)), grad, chance, AR)
    for key, q in (("dgrad", quantised[2]), ("wgrad", quantised[4])):
        assert q.amax == case[f"out/{key}/amax"]
        np.testing.assert_array_equal(q.packed, case[f"out/{key}/packed"])
        np.testing.assert_array_equal(scale_bytes(q), case[f"out/{key}/scales"])


def arguments(tokens=(3, 21), k=48, n=32, dtype=jnp.bfloat16):
    """x and the gradient of the output; kernel; key. 63 tokens are no whole number of blocks."""
    kernel = normal((k, n), 2) / np.float32(np.sqrt(k))
    return normal((*tokens, k), 1, dtype), kernel, jax.random.key(3), normal((*tokens, n), 4, dtype)


@functools.partial(jax.jit, static_argnames="recipe")
def results(x, kernel, key, grad, recipe=AR):
    """The output, and the gradients of x and kernel."""
    y, back = jax.vjp(lambda x, kernel: linear(x, kernel, key, recipe), x, kernel)
    return (y, *back(grad))


def distance(ours, theirs) -> float:
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_is_a_linear_layer_to_four_bits(dtype):
    """Operands have relative errors near 0.1, so products near 0.14; gradients of kernels, of which
    x is rounded twice and both sides after a rotation, a little more. Nothing is zero.
    """
    x, kernel, key, grad = arguments((4, 64), 128, 96, dtype)
    found = results(x, kernel, key, grad)
    plain = [np.asarray(a, np.float32) for a in (x, kernel, grad)]
    rows, back = plain[0].reshape(-1, 128), plain[2].reshape(-1, 96)
    want = (plain[0] @ plain[1], plain[2] @ plain[1].T, rows.T @ back)
    for ours, theirs, like, limit in zip(
        found, want, (x, x, kernel), (0.16, 0.2, 0.25), strict=True
    ):
        assert ours.dtype == like.dtype and ours.shape == theirs.shape
        assert 0.05 < distance(ours, theirs) < limit
        assert (np.asarray(ours) != 0).mean() > 0.99


def test_the_public_layer_is_the_one_that_is_compared():
    """With what the key decides, and tokens in any shape."""
    x, kernel, key, grad = arguments()
    chance = vars(Chance.of(key, AR, jnp.arange(63), grad.shape[-1]))
    assert chance["signs"].shape == (16,) and set(np.unique(chance["signs"])) == {-1, 1}
    flat = x.reshape(63, -1), kernel, grad.reshape(63, -1)
    _, y, (dx, dkernel) = everything(*flat, chance, AR)
    found = results(x, kernel, key, grad)
    for ours, theirs in zip(found, (y, dx, dkernel), strict=True):
        close_bfloat16(ours.reshape(theirs.shape), theirs)


def test_tokens_are_filled_up_with_zeros():
    x, _, _, grad = arguments((63,))
    fill = lambda a: jnp.pad(a, ((0, 1), (0, 0)))  # noqa: E731
    wgrad = jax.jit(lambda x, grad: vjp.wgrad(quantize(x), grad, Chance(SIGNS), NEAREST))
    for ours, theirs in zip(wgrad(x, grad), wgrad(fill(x), fill(grad)), strict=True):
        assert ours.shape[-1] == 64
        same(ours, theirs)


def test_a_key_decides_the_gradient_and_nothing_else():
    x, kernel, key, grad = arguments()
    found, again, other = (results(x, kernel, k, grad) for k in (key, key, jax.random.key(9)))
    for a, b, c in zip(found, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.array_equal(a, c) == (a is found[0])
    raw = jax.random.key_data(key)  # a key of the old kind
    for a, b in zip(found, results(x, kernel, raw, grad), strict=True):
        np.testing.assert_array_equal(a, b)
    assert Chance.of(key, Recipe(stochastic=False, hadamard=False), jnp.arange(3), 16) == Chance()


def test_chance_goes_with_the_token():
    """Blocks of 16 tokens in another order, said so: the same bytes, elsewhere."""
    x, kernel, key, grad = arguments((64,))
    order = jnp.asarray(np.random.default_rng(0).permutation(4))
    tokens = (16 * order[:, None] + jnp.arange(16)).reshape(-1)

    @jax.jit
    def moved(x, grad, tokens):
        call = lambda x, kernel: linear(x, kernel, key, AR, tokens)  # noqa: E731
        y, back = jax.vjp(call, x, kernel)
        return (y, *back(grad))

    y, dx, dkernel = results(x, kernel, key, grad)
    found = moved(x[tokens], grad[tokens], tokens)
    np.testing.assert_array_equal(found[0], y[tokens])
    np.testing.assert_array_equal(found[1], dx[tokens])
    np.testing.assert_allclose(found[2], dkernel, rtol=1e-5, atol=1e-5)
    silent = moved(x[tokens], grad[tokens], jnp.arange(64))
    assert not np.array_equal(silent[1], dx[tokens])


def test_gradients_have_no_bias():
    """Stochastic rounding by a static rule: over keys, the mean of the gradient of x comes to what
    the gradient of the output would give as it is.
    """
    x, kernel, key, grad = arguments((32,), dtype=jnp.float32)
    recipe = Recipe(gradients="static_6")
    keys = jax.random.split(key, 256)
    found = jax.jit(jax.vmap(lambda key: results(x, kernel, key, grad, recipe)[1]))(keys)
    exact = grad @ numbers(quantized(kernel, tile=16)).T
    assert distance(found[0], exact) > 0.1
    assert distance(found.mean(0), exact) < 0.02


def test_of_x_only_its_quantised_form_is_kept():
    x, kernel, key, _ = arguments((4, 16))
    _, back = jax.jit(lambda x, kernel: jax.vjp(lambda *a: linear(*a, key), x, kernel))(x, kernel)
    kept = [leaf for leaf in jax.tree.leaves(back) if hasattr(leaf, "dtype")]
    kinds = {(leaf.shape, str(leaf.dtype)) for leaf in kept}
    assert ((64, 24), "uint8") in kinds and ((64, 3), "uint8") in kinds  # codes and scales
    large = {kind for kind in kinds if np.prod(kind[0], dtype=int) >= x.size}
    assert large == set()  # kernel alone is smaller, and it is there
    assert ((48, 32), "float32") in kinds


def test_it_goes_through_every_transformation():
    """Over a stack of kernels and their keys."""
    keep = jax.checkpoint_policies.everything_saveable
    x, _, key, grad = arguments()
    kernels, keys = normal((2, 48, 32), 5) / 6, jax.random.split(key, 2)

    def scanned(step):
        def run(x, kernels):
            return jax.lax.scan(lambda _, given: (None, step(x, *given)), None, (kernels, keys))[1]

        y, back = jax.vjp(run, x, kernels)
        return y, *back(jnp.stack([grad, grad]))

    ways = {
        "scan": lambda: scanned(linear),
        "checkpoint": lambda: scanned(jax.checkpoint(linear)),
        # What is kept goes through `reduce_precision`, which knows no e4m3fn.
        "all kept": lambda: scanned(jax.checkpoint(linear, policy=keep)),
        "vmap": lambda: jax.vmap(results, (None, 0, 0, None))(x, kernels, keys, grad),
    }
    alone = [results(x, kernels[i], keys[i], grad) for i in range(2)]
    for name, way in ways.items():
        y, dx, dkernels = jax.jit(way)()
        for i, (own, own_dx, own_dkernel) in enumerate(alone):
            close_bfloat16(y[i], own)
            close_bfloat16(dkernels[i], own_dkernel)
            if name == "vmap":
                close_bfloat16(dx[i], own_dx)
        if name != "vmap":  # the sum of both, in bfloat16
            assert distance(dx, sum(np.asarray(a[1], np.float32) for a in alone)) < 2**-8


def test_a_key_has_no_gradient():
    x, kernel, key, _ = arguments()
    call = lambda x, kernel, key: linear(x, kernel, key).astype(jnp.float32).sum()  # noqa: E731
    found = jax.eval_shape(jax.grad(call, (0, 1, 2), allow_int=True), x, kernel, key)
    assert found[2].dtype == jax.dtypes.float0
    assert [found[i].dtype for i in (0, 1)] == [x.dtype, kernel.dtype]


def test_a_sharded_layer_has_the_same_operands():
    """Tokens over all devices, or tokens over some and features over others: operands to the byte,
    sums to their rounding.
    """
    x, kernel, key, grad = arguments((8, 16), 64, 64)
    chance = vars(Chance.of(key, AR, jnp.arange(128), 64))
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh(), PartitionSpec(*spec)))  # noqa: E731

    @jax.jit
    def flat(x, kernel, grad):
        return everything(x.reshape(128, 64), kernel, grad.reshape(128, 64), chance, AR)

    whole, y, gradients = flat(x, kernel, grad)
    spread, apart = (("a", "b"), (None, None)), (("a", None), (None, "b"))
    found, *_ = flat(put(x, spread[0]), put(kernel, spread[1]), put(grad, spread[0]))
    for ours, theirs in zip(found, whole, strict=True):
        same(jax.device_get(ours), jax.device_get(theirs))
    found = results(put(x, apart[0]), put(kernel, apart[1]), key, put(grad, apart[0]))
    for ours, theirs in zip(found, (y, *gradients), strict=True):
        close_bfloat16(jax.device_get(ours).reshape(theirs.shape), theirs)


def test_recipes_are_those_of_the_reference(facts):
    """What its linear layer quantised, in order: rule, round, tiles, transposed, rotated."""
    for name, recipe in (("train_ar_stochastic", AR), ("train_dmd_nearest", DMD)):
        calls = facts("longlive2", f"11_fp4_linear_{name}")["quantize_calls"]
        assert [c["scale_rule"] for c in calls] == [
            recipe.weights,
            recipe.activations,
            recipe.gradients,
            recipe.weights,
            recipe.gradients,
            recipe.activations,
        ]
        assert [c["block_scale_2d"] == "True" for c in calls] == [i in (0, 3) for i in range(6)]
        assert [c["had"] is not None for c in calls] == [i > 3 for i in range(6)]
    rounds = [
        c["round_style"]
        for c in facts("longlive2", "11_fp4_linear_train_ar_stochastic")["quantize_calls"]
    ]
    assert [i for i, r in enumerate(rounds) if r == "stochastic"] == [2, 4]


def test_kernels_divide_into_blocks():
    x, kernel, key, _ = arguments()
    for bad in (kernel[:40], kernel[:, :24]):
        with pytest.raises(ValueError, match="does not divide into blocks of 16"):
            linear(x[..., : bad.shape[0]], bad, key)
