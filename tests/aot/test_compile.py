"""Programs compiled for GPUs that are not there: the compiler takes them, and says what they need.

Needs the [aot] extra. The GPUs are described in tests/gpu_specs, one file each.
"""

import jax
import jax.numpy as jnp
import pytest

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("gpu", ["h100", "b200", "rtx6000pro"])
def test_a_matrix_product_compiles(device, gpu):
    sharding = device(gpu)
    a = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=sharding)
    compiled = jax.jit(lambda x, y: jax.nn.relu(x @ y)).lower(a, a).compile()
    assert "cublas" in compiled.as_text() or "__triton" in compiled.as_text()
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * 512 * 512 * 2
