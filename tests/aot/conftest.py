"""GPUs by description: `device("h100")` is a sharding to lower programs for."""

import pathlib

import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

SPECS = pathlib.Path(__file__).parents[1] / "gpu_specs"


@pytest.fixture
def topology():
    """`topology("h100", 8)`: that many GPUs of that kind, as the compiler sees them."""

    def describe(gpu: str, count: int = 1):
        pytest.importorskip(
            "jax_plugins.xla_cuda13", reason="needs the [aot] extra", exc_type=ImportError
        )
        spec = (SPECS / f"{gpu}.txtpb").read_text()
        return topologies.get_topology_desc(
            platform="cuda", topology_name=gpu, target_config=spec, topology=f"1x{count}x1"
        )

    return describe


@pytest.fixture
def device(topology):
    """The sharding of an array that lives whole on one GPU of that kind."""

    def shard(gpu: str) -> SingleDeviceSharding:
        return SingleDeviceSharding(topology(gpu).devices[0])

    return shard
