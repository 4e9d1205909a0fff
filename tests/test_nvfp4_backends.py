"""GPU kernels for NVFP4 on the CPU: in simulators beside the reference, and what they refuse.

The tests marked `aot` need Triton, which comes with the [aot] extra.
"""

import contextlib
import functools
import itertools
import pathlib
import pickle
import subprocess
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import mosaic_on_cpu
import numpy as np
import parity
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from longlive_kernels import absent_gpu, arch, jax_versions
from longlive_kernels.nvfp4 import NVFP4, RULES
from longlive_kernels.nvfp4.format import BLOCK, VALUES, decode, unpack, unscaled
from longlive_kernels.nvfp4.matmul import api as matmul_api
from longlive_kernels.nvfp4.matmul import (
    cudnn,
    matmul,
    matmul_w4a16,
    mixed,
    mosaic,
    shapes,
    wgmma,
)
from longlive_kernels.nvfp4.matmul import triton as triton_matmul
from longlive_kernels.nvfp4.quantize import api as quantize_api
from longlive_kernels.nvfp4.quantize import dequantize, quantize
from longlive_kernels.nvfp4.quantize import triton as triton_quantize
from longlive_kernels.nvfp4.quantize.reference import unblocked

BOTH = ("xla", "reference")
BFLOAT16 = 2.0**-8  # how far apart two neighbours may be, of their size
ORDER = 1e-5  # of the largest: what float32 sums in another order differ by
PROGRAM = pathlib.Path(__file__).parent / "triton_on_cpu.py"


quantized_jit = jax.jit(quantize, static_argnames=("rule", "tile"))


reference = jax.jit(
    lambda a, b, dtype=jnp.bfloat16: matmul(a, b, dtype=dtype, implementation="reference"),
    static_argnames="dtype",
)


def normal(shape, seed: int = 0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def quantized(shape, seed: int = 0, rule: str = "static_6") -> NVFP4:
    """Of numbers whose sizes differ so much that scales are normal, subnormal and zero."""
    sizes = jnp.exp(4 * normal((*shape[:-1], shape[-1] // BLOCK), seed + 100))
    return quantized_jit(normal(shape, seed) * jnp.repeat(sizes, BLOCK, -1), rule=rule)


def blank(shape) -> NVFP4:
    """Zeros, for what only looks at shapes."""
    *stack, rows, columns = shape
    packed = jnp.zeros((*stack, rows, columns // 2), jnp.uint8)
    scales = jnp.zeros((*stack, rows, columns // BLOCK), jnp.float8_e4m3fn)
    return NVFP4(packed, scales, jnp.zeros(stack), "mse")


def close(ours, theirs):
    """Each rounded to bfloat16 once, after sums in another order."""
    ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0
    bound = BFLOAT16 * np.abs(theirs) + ORDER * np.abs(theirs).max()
    assert (np.abs(ours - theirs) <= bound).all()


FOUR_BITS = {"cudnn": cudnn, "triton": triton_matmul, "mosaic": mosaic}


@pytest.mark.parametrize("backend", FOUR_BITS.values(), ids=FOUR_BITS)
def test_hopper_is_told_that_it_has_no_fp4_units(backend):
    a, b = blank((128, 256)), blank((128, 256))
    reason = backend.unsupported(a, b, jnp.bfloat16, sm=90)
    assert "no FP4 units" in reason and "sm_90" in reason
    assert "matmul_w4a16" in reason and 'implementation="xla"' in reason
    assert backend.unsupported(a, b, jnp.bfloat16) == "needs an NVIDIA GPU"
    assert "two quantised" in backend.unsupported(normal((128, 256)), b, jnp.bfloat16, sm=100)


@pytest.mark.parametrize("sm", [None, 90, 100, 120])
def test_what_has_not_run_on_a_device_is_never_the_default(monkeypatch, sm):
    """Plain `jnp` is: in bfloat16 wherever that holds what is multiplied."""
    monkeypatch.setattr(arch, "default", lambda: sm)
    a, b, x = blank((128, 256)), blank((128, 256)), normal((128, 256))
    for module, args, name in (
        (matmul_api, (a, b, jnp.bfloat16), "xla"),
        (matmul_api, (a, b, jnp.float32), "xla"),
        (matmul_api, (x.astype(jnp.bfloat16), b, jnp.bfloat16), "xla"),
        (matmul_api, (x, b, jnp.float32), "reference"),
        (quantize_api, (x, {}), "reference"),
    ):
        assert module._backend(None, *args) is module.BACKENDS[name]


def test_bfloat16_holds_a_value_times_its_scale():
    """Of all pairs of the two."""
    codes = jnp.arange(16, dtype=jnp.uint8)
    finite = jnp.arange(127, dtype=jnp.uint8)  # scales are not negative; 127 is NaN
    scales = lax.bitcast_convert_type(finite, jnp.float8_e4m3fn)
    row = jnp.tile(codes[::2] | (codes[1::2] << jnp.uint8(4)), (127, 1))  # 127 8
    q = NVFP4(row, scales[:, None], jnp.float32(1), "mse")
    exact = VALUES.astype(np.float64) * np.asarray(scales, np.float64)[:, None]
    held = unscaled(q.packed, q.scales).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(held, np.float64), exact)


@pytest.mark.parametrize("name", ["odd_rows", "odd_columns"])
def test_xla_has_the_sums_of_bfloat16_on_cpus_too(name):
    """There it multiplies float32, which is the same numbers, where factors are those of sums."""
    shape = shapes.SHAPES[name]
    a, b = quantized(shape.a, 0), quantized(shape.b, 1)

    @jax.jit
    def expected(*operands):
        held = [unscaled(q.packed, q.scales).astype(jnp.bfloat16) for q in operands]
        sums = jnp.matmul(held[0], held[1].mT, preferred_element_type=jnp.float32)
        for q in operands:
            sums *= RULES[q.rule].unit(q.amax)[..., None, None]
        return sums

    found = jax.jit(functools.partial(matmul, dtype=jnp.float32, implementation="xla"))(a, b)
    np.testing.assert_array_equal(found, expected(a, b))


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "f32"), ("cuda", "bf16"), ("tpu", "bf16")])
def test_xla_multiplies_bfloat16_where_tensor_cores_are(platform, dtype):
    """In the program that is lowered for them."""
    a, b, x = blank((32, 64)), blank((48, 64)), normal((32, 64), dtype=jnp.bfloat16)
    for product, left in ((matmul, a), (matmul_w4a16, x)):
        call = jax.jit(functools.partial(product, implementation="xla"))
        text = call.trace(left, b).lower(lowering_platforms=(platform,)).as_text()
        (dot,) = [line for line in text.splitlines() if "dot_general" in line]
        assert f"(tensor<32x64x{dtype}>" in dot


@pytest.mark.parametrize(
    "name", ["odd_rows", "odd_columns", "long_sum", "stacked", "tiny_square_wgrad"]
)
def test_xla_multiplies_what_the_reference_does(name):
    """In sums of another order, each rounded once; the reference rounds operands to float32 too,
    which is no more than that. W4A4 in float32 shows the sums themselves.
    """
    shape = shapes.SHAPES[name]
    x = normal(shape.a, dtype=jnp.bfloat16)
    a, b = quantized_jit(x, rule="mse"), quantized(shape.b, 1)
    product = jax.jit(matmul, static_argnames=("dtype", "implementation"))
    ours, theirs = (product(a, b, dtype=jnp.float32, implementation=i) for i in BOTH)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ORDER * np.abs(theirs).max())
    close(*(product(a, b, implementation=i) for i in BOTH))
    if not shape.batch:
        mixed = jax.jit(matmul_w4a16, static_argnames="implementation")
        ours, theirs = (mixed(x, b, implementation=i) for i in BOTH)
        assert ours.dtype == jnp.bfloat16
        close(ours, theirs)


def test_xla_refuses_numbers_that_it_would_round():
    reason = "xla multiplies bfloat16 with quantised weights, not float32"
    with pytest.raises(NotImplementedError, match=reason):
        matmul_w4a16(normal((16, 32)), blank((16, 32)), implementation="xla")


def test_factors_of_small_matrices_do_not_vanish():
    """Their product is less than what float32 holds."""
    a = quantized((16, 32))
    small = NVFP4(a.packed, a.scales, jnp.float32(1e-18), a.rule)
    large = NVFP4(a.packed, a.scales, jnp.float32(1e-19), a.rule)
    found = matmul(small, large, dtype=jnp.float32, implementation="xla")
    assert jnp.abs(found).max() > 0


def test_gradients_go_through_weights_that_are_unpacked():
    """Of an adapter beside them, say."""
    x, w = normal((16, 32), dtype=jnp.bfloat16), quantized((48, 32), 1)
    loss = lambda x, i: matmul_w4a16(x, w, implementation=i).astype(jnp.float32).sum()  # noqa: E731
    close(*(jax.grad(loss)(x, i) for i in BOTH))


def test_a_backend_that_is_named_runs_or_says_why_not(monkeypatch):
    a, x = blank((128, 256)), normal((128, 256), dtype=jnp.bfloat16)
    for sm, call, name, reason in (
        (None, lambda **how: matmul_w4a16(x, a, **how), "wgmma", "wgmma needs an NVIDIA GPU"),
        (90, lambda **how: matmul(a, a, **how), "cudnn", "cudnn cannot run on sm_90: Hopper"),
        (90, lambda **how: matmul(a, a, **how), "wgmma", "wgmma multiplies numbers with"),
        (100, lambda **how: matmul_w4a16(x, a, **how), "mosaic", "mosaic multiplies two"),
        (None, lambda **how: quantize(x, **how), "triton", "triton needs an NVIDIA GPU"),
    ):
        monkeypatch.setattr(arch, "default", lambda sm=sm: sm)
        with pytest.raises(NotImplementedError, match=reason):
            call(implementation=name)


@pytest.mark.parametrize(
    ("a", "n", "sm", "dtype", "reason"),
    [
        ((128, 256), 128, 100, jnp.bfloat16, None),
        ((37, 320), 40, 103, jnp.float16, None),
        ((128, 256), 128, 120, jnp.bfloat16, "not sm_120"),
        ((2, 128, 256), 128, 100, jnp.bfloat16, "stacks"),
        ((128, 48), 128, 100, jnp.bfloat16, "multiples of 64"),
        ((128, 256), 12, 100, jnp.bfloat16, "n of 8"),
        ((128, 256), 128, 100, jnp.float32, "not float32"),
    ],
)
def test_mosaic_says_what_it_lacks(a, n, sm, dtype, reason):
    operands = blank(a), blank((*a[:-2], n, a[-1]))
    found = mosaic.unsupported(*operands, dtype, sm=sm)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("x", "w", "sm", "dtype", "reason"),
    [
        ((5, 128), (128, 128), 90, jnp.bfloat16, None),
        ((2, 5, 128), (128, 128), 90, jnp.bfloat16, None),
        ((5, 128), (128, 128), 100, jnp.bfloat16, "not sm_100"),
        ((5, 128), (128, 128), None, jnp.bfloat16, "needs an NVIDIA GPU"),
        ((5, 128), (64, 128), 90, jnp.bfloat16, "multiples of 128 x 128"),
        ((5, 64), (128, 64), 90, jnp.bfloat16, "multiples of 128 x 128"),
        ((5, 128), (128, 128), 90, jnp.float32, "float32"),
    ],
)
def test_wgmma_says_what_it_lacks(x, w, sm, dtype, reason):
    found = wgmma.unsupported(jnp.zeros(x, dtype), blank(w), dtype, sm=sm)
    assert found is None if reason is None else reason in found
    four = blank((128, 128))
    assert "matmul_w4a16" in wgmma.unsupported(four, four, jnp.bfloat16, sm=90)


def test_cudnn_says_what_it_lacks():
    a, b = blank((2, 128, 48)), blank((2, 64, 48))
    assert "multiples of 32, " in cudnn.unsupported(a, b, jnp.bfloat16, sm=100)
    a, b = blank((2, 37, 96)), blank((2, 5, 96))
    assert cudnn.unsupported(a, b, jnp.bfloat16, sm=100) is None


def test_triton_says_what_it_lacks():
    x = normal((16, 256))
    assert triton_quantize.unsupported(x) == "needs an NVIDIA GPU"
    assert "sm_80" in triton_quantize.unsupported(x, sm=80)
    assert "int32" in triton_quantize.unsupported(x.astype(jnp.int32), sm=90)
    stacked, narrow = blank((2, 16, 256)), blank((16, 128))
    assert "stacks" in triton_matmul.unsupported(stacked, stacked, jnp.bfloat16, sm=100)
    assert "256" in triton_matmul.unsupported(narrow, narrow, jnp.bfloat16, sm=100)
    with mock.patch("importlib.util.find_spec", return_value=None):
        assert triton_quantize.unsupported(x, sm=90) == "needs jax_triton"
        four = blank((16, 256))
        assert triton_matmul.unsupported(four, four, jnp.bfloat16, sm=100) == "needs jax_triton"


@pytest.mark.parametrize(
    ("capability", "number"), [("9.0", 90), ("10.3", 103), ("gfx942", None), (None, None)]
)
def test_an_architecture_is_read_off_a_device(capability, number):
    device = mock.Mock(spec=jax.Device, compute_capability=capability)
    assert arch.of(device) == number


def test_a_pretended_device_is_the_default_for_a_while():
    with absent_gpu.target(mock.Mock(spec=jax.Device, compute_capability="9.0")):
        assert arch.default() == 90
    assert arch.default() is None


class Transposed:
    def __init__(self, ref):
        self.ref = ref

    def __setitem__(self, index, value):
        self.ref[index] = value.T


def simulated(rows: int):
    """Mosaic's simulator has no layouts, no transposed references, and no operand of a product in
    registers: here they are copies in shared memory, of x [columns rows] and of weights.
    """
    real = plgpu.kernel, plgpu.wgmma

    def kernel(body, *, scratch_types, **options):
        def wrapped(*refs, left, right, **scratch):
            def product(total, weights, columns):
                group = lax.axis_index("group")
                left[group] = weights
                right[group] = columns.ref[...].T
                real[1](total, left.at[group], right.at[group])

            with mock.patch.object(plgpu, "wgmma", product):
                body(*refs, **scratch)

        copies = [
            plgpu.SMEM((wgmma.MULTIPLIERS, *shape), jnp.bfloat16)
            for shape in ((wgmma.ROWS, wgmma.HALF), (wgmma.HALF, rows))
        ]
        scratch_types = scratch_types | dict(zip(("left", "right"), copies, strict=True))
        return real[0](wrapped, scratch_types=scratch_types, **options)

    stack = contextlib.ExitStack()
    for (module, name), stand_in in {
        (plgpu, "kernel"): kernel,
        (plgpu, "layout_cast"): lambda x, layout: x,
        (plgpu, "broadcasted_iota"): lambda dtype, shape, axis, **_: lax.broadcasted_iota(
            dtype, shape, axis
        ),
        (jax_versions, "load"): lambda ref, **_: ref[...],
        (jax_versions, "transposed"): Transposed,
    }.items():
        stack.enter_context(mock.patch.object(module, name, stand_in))
    stack.enter_context(mosaic_on_cpu.interpreted())
    return stack


@pytest.mark.parametrize(
    ("x", "w", "rule"),
    [
        ((16, 128), (128, 128), "mse"),
        ((2, 9, 512), (128, 512), "static_4"),  # stages are used again; rows are filled up
        ((208, 128), (256, 128), "static_6"),  # tiles both ways
    ],
)
def test_wgmma_means_what_the_reference_means(x, w, rule):
    x, w = normal(x, 3, jnp.bfloat16), quantized(w, rule=rule)
    assert wgmma.unsupported(x, w, jnp.bfloat16, sm=90) is None
    with simulated(wgmma.tile_rows(x.size // x.shape[-1])):
        ours = jax.jit(lambda x, w: wgmma.matmul_w4a16(x, w, jnp.bfloat16))(x, w)
        jax.block_until_ready(ours)
    close(ours, jax.jit(lambda x, w: matmul_w4a16(x, w, implementation="reference"))(x, w))


def test_weights_are_unpacked_exactly():
    codes = jnp.arange(16, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(
        np.asarray(mixed.doubled(codes), np.float32)[0], 2 * VALUES.astype(np.float32)
    )
    # So is their product with a scale.
    scales = np.arange(127, dtype=np.uint8).view(jnp.float8_e4m3fn)
    product = mixed.doubled(codes).T * jnp.asarray(scales).astype(jnp.bfloat16)
    expected = 2 * VALUES[:, None] * scales.astype(np.float32)
    np.testing.assert_array_equal(np.asarray(product, np.float32), expected)


@pytest.mark.parametrize("m", [1, 8, 48, 185, 192, 200, 400, 4680, 4688, 4696, 7040])
def test_a_tile_fits_and_little_is_filled_up(m):
    rows = wgmma.tile_rows(m)
    assert rows % 8 == 0 and 8 <= rows <= wgmma.LARGEST
    assert -m % rows < max(8, 0.1 * m) or m < wgmma.LARGEST
    assert {4680: 120, 7040: 176}.get(m, rows) == rows


def plain(a, b, a_scales, b_scales, *, preferred_element_type):
    """What `jax.nn.scaled_matmul` is on GPUs; it has no form for CPUs."""
    a, b = (
        x.astype(jnp.float32) * jnp.repeat(s.astype(jnp.float32), BLOCK, -1)
        for x, s in ((a, a_scales), (b, b_scales))
    )
    return jnp.einsum("bmk,bnk->bmn", a, b, preferred_element_type=preferred_element_type)


@pytest.mark.parametrize(
    ("stack", "rules"), [((), ("static_6", "static_4")), ((2, 3), ("static_4", "static_6"))]
)
def test_what_surrounds_the_product_of_cudnn(monkeypatch, stack, rules):
    monkeypatch.setattr(jax.nn, "scaled_matmul", plain)
    a, b = (
        quantized((*stack, rows, 96), rows, rule)
        for rows, rule in zip((24, 32), rules, strict=True)
    )
    ours = jax.jit(lambda a, b: cudnn.matmul(a, b, jnp.bfloat16))(a, b)
    close(ours, reference(a, b))


def test_what_tensor_cores_of_blackwell_are_given():
    a = quantized((200, 192))
    values = np.asarray(mosaic._values(a), np.float32)
    np.testing.assert_array_equal(values, decode(unpack(a.packed)))
    scales = np.asarray(mosaic._scales(a), np.float32)
    assert scales.shape == (2, 3, 32, 16)
    rows, columns = np.indices(a.scales.shape)
    found = scales[rows // 128, columns // 4, rows % 32, 4 * (rows % 128 // 32) + columns % 4]
    np.testing.assert_array_equal(found, np.asarray(a.scales, np.float32))
    assert scales.sum() == found.sum()  # the rest is zeros


class Calls:
    """Stands in for jax_triton: calls are recorded, and run together."""

    def __init__(self):
        self.calls = []

    def triton_call(self, *arrays, kernel, out_shape, grid, **options):
        for name in ("num_warps", "num_stages", "compute_capability", "enable_fp_fusion"):
            options.pop(name, None)
        outputs = jax.tree.leaves(out_shape)
        arrays = [np.asarray(x) for x in arrays]
        shapes = [(x.shape, np.dtype(x.dtype)) for x in outputs]
        self.calls.append((kernel, grid + (1,) * (3 - len(grid)), arrays, shapes, options))
        made = [jnp.zeros(x.shape, x.dtype) for x in outputs]
        return made[0] if len(made) == 1 else made

    def run(self) -> list[list[np.ndarray]]:
        done = subprocess.run(
            [sys.executable, PROGRAM], input=pickle.dumps(self.calls), stdout=-1, check=True
        )
        return pickle.loads(done.stdout)


@pytest.fixture
def calls(monkeypatch):
    pytest.importorskip("triton", reason="needs the [aot] extra")
    parity.needed("torch")  # which holds what Triton's interpreter reads and writes
    made = Calls()
    monkeypatch.setitem(sys.modules, "jax_triton", made)
    for module, kernel in (("quantize.fused", "quantized"), ("matmul.dot_scaled", "product")):
        stand_in = types.SimpleNamespace(**{kernel: kernel})
        monkeypatch.setitem(sys.modules, f"longlive_kernels.nvfp4.{module}", stand_in)
    return made


def hard(shape, dtype):
    """Sizes that differ much, zeros of both signs, a block of zeros."""
    x = normal(shape) * jnp.exp(2 * normal(shape, 1))
    x = x.at[..., 0, :16].set(0).at[..., 3, 5].set(-0.0).at[..., :16, 16:32].set(0)
    return x.astype(dtype)


def same(calls: Calls, expected: list[NVFP4]):
    for ours, theirs in zip(calls.run(), expected, strict=True):
        np.testing.assert_array_equal(ours[0], theirs.packed)
        np.testing.assert_array_equal(ours[1], np.asarray(theirs.scales).view(np.uint8))


PLAIN = dict(transpose=False, signs=None, sm=90)


@pytest.mark.aot
def test_triton_quantises_to_the_bytes_of_the_reference(calls):
    expected = []
    for (tile, dtype), rule in itertools.product(((1, jnp.float32), (16, jnp.bfloat16)), RULES):
        x, options = hard((2, 48, 144), dtype), dict(rule=rule, tile=tile)
        amax = jnp.abs(x).max((1, 2)).astype(jnp.float32)
        shape = (RULES[rule].candidates, 2, 48 // tile, 9, 16 * tile)
        draws = jax.random.uniform(jax.random.key(2), shape, jnp.float32)
        flat = draws.reshape(*shape[:2], -1, shape[-1])
        for given, placed in ((None, None), (flat, unblocked(draws, tile))):
            expected.append(quantized_jit(x, draws=given, **options))
            triton_quantize.quantize(x, amax=amax, draws=placed, **options, **PLAIN)
    same(calls, expected)


def in_order(x):
    """Another order than that of `exact.total`."""
    return sum(x[..., i] for i in range(x.shape[-1]))


@pytest.mark.aot
def test_triton_adds_errors_in_the_order_of_the_reference(calls):
    """Of many blocks, those whose scale depends on the order."""
    options = dict(rule="mae", amax=jnp.float32(5.7))
    x = jnp.round(8 * normal((2**17, 16))) / 8  # errors that are often nearly the same
    with mock.patch("longlive_kernels.nvfp4.exact.total", in_order):
        other = jax.jit(lambda x: quantize(x, **options))(x)
    ours = jax.jit(lambda x: quantize(x, **options))(x)
    tied = np.any(np.asarray(ours.packed != other.packed), axis=1)
    assert tied.any()
    x = x[np.flatnonzero(tied)]
    triton_quantize.quantize(x, tile=1, draws=None, **options, **PLAIN)
    same(calls, [quantize(x, **options)])


@pytest.mark.aot
def test_triton_rounds_without_bias_from_a_seed(calls):
    """The mean over elements of one value: between two neighbours, 1/5 of the way up."""
    x = jnp.full((256, 256), 2.2 / 6).at[:, ::16].set(1)  # blocks have the scale 1 / 6
    for seed in (1, 1, 2):
        options = dict(rule="static_6", tile=1, draws=None, amax=jnp.float32(1))
        triton_quantize.quantize(x, seed=jnp.int32(seed), **options, **PLAIN)
    first, again, other = (
        dequantize(
            NVFP4(
                jnp.asarray(p), jnp.asarray(s).view(jnp.float8_e4m3fn), jnp.float32(1), "static_6"
            )
        )
        for p, s in calls.run()
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.2
    up = np.asarray(first).reshape(-1, 16)[:, 1:] * 6 > 2.5
    assert abs(up.mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / up.size)


@pytest.mark.aot
def test_triton_multiplies_what_the_reference_multiplies(calls):
    shapes = [(16, 16, 256), (300, 136, 512), (1200, 129, 256)]  # edges; several bands
    expected = []
    for m, n, k in shapes:
        a, b = quantized((m, k), m), quantized((n, k), n, "static_4")
        triton_matmul.matmul(a, b, jnp.float32, sm=100)
        expected.append(reference(a, b, dtype=jnp.float32))
    for (out,), theirs in zip(calls.run(), expected, strict=True):
        close(out.view(np.float32), theirs)
