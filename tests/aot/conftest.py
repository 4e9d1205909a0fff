"""GPUs by description: `device("h100")` is a sharding to lower programs for."""

import described
import pytest
from jax.sharding import SingleDeviceSharding


@pytest.fixture
def gpus():
    """`gpus("h100", 8)`: that many GPUs of that kind, as the compiler sees them."""
    pytest.importorskip(
        "jax_plugins.xla_cuda13", reason="needs the [aot] extra", exc_type=ImportError
    )
    return described.devices


@pytest.fixture
def device(gpus):
    """The sharding of an array that lives whole on one GPU of that kind."""

    def shard(gpu: str) -> SingleDeviceSharding:
        return SingleDeviceSharding(*gpus(gpu))

    return shard
