"""What `longlive doctor` says of products in fewer bits, for every architecture that it knows: the
programs compiled without a GPU. Needs the [aot] extra.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from longlive_kernels import absent_gpu
from longlive_kernels.nvfp4 import NVFP4
from longlive_kernels.nvfp4.matmul import xla

from longlive_jax import backends, gpus
from longlive_jax.dit.storage import CODECS

pytestmark = pytest.mark.aot

# One GPU of each architecture, and a product of the 1.3B's.
GPUS = {gpu.architecture: gpu for gpu in gpus.GPUS.values()}
M, K, N = 4680, 1536, 1536
UNITS = {"fp8": (jnp.float8_e4m3fn, jnp.float32), "int8": (jnp.int8, jnp.int32)}


@pytest.fixture(params=gpus.ARCHITECTURES)
def device(request):
    pytest.importorskip(
        "jax_plugins.xla_cuda13", reason="needs the [aot] extra", exc_type=ImportError
    )
    gpu = GPUS[request.param]
    return request.param, SingleDeviceSharding(*absent_gpu.devices(gpu.name, gpu.describe()))


def compiled(function, sharding, *arrays):
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.jit(function).lower(*jax.tree.map(place, arrays)).compile()


def of(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def four(rows: int) -> NVFP4:
    parts = of(jnp.uint8, rows, K // 2), of(jnp.float8_e4m3fn, rows, K // 16), of(jnp.float32)
    return NVFP4(*parts, "mse")


@pytest.mark.parametrize("kind", UNITS)
def test_eight_bits_are_multiplied_as_they_are_where_it_is_said(device, kind):
    architecture, sharding = device
    dtype, sums = UNITS[kind]
    product = functools.partial(jnp.einsum, "mk,kn->mn", preferred_element_type=sums)
    text = compiled(product, sharding, of(dtype, M, K), of(dtype, K, N)).as_text()
    units = " convert(" not in text
    rows = {row["on"].split()[0]: row for row in backends.low_bits()}
    assert units == rows[architecture][f"{kind} products"].startswith("in its units")


def test_four_bits_are_unpacked_and_multiplied_in_bfloat16(device):
    """Beside the operands in bfloat16 there is the result in float32, at most."""
    _, sharding = device
    both = functools.partial(xla.matmul, dtype=jnp.bfloat16)
    one = functools.partial(xla.matmul_w4a16, dtype=jnp.bfloat16)
    for program in (
        compiled(both, sharding, four(M), four(N)),
        compiled(one, sharding, of(jnp.bfloat16, M, K), four(N)),
    ):
        room = 2 * (M + N) * K + 4 * M * N
        assert program.memory_analysis().temp_size_in_bytes <= 1.1 * room


@pytest.mark.parametrize("kind", CODECS)
def test_what_a_cache_keeps_is_made(device, kind):
    _, sharding = device
    frames, same = of(jnp.bfloat16, 1, 3, 1560, 12, 128), of(jnp.bool_, 1, 3, 3)
    compiled(CODECS[kind].encode, sharding, frames, same)
