"""GPUs by description: `device("h100")` is a sharding to lower programs for."""

import os
import pathlib
import sysconfig

import described
import pytest
from jax.sharding import SingleDeviceSharding


@pytest.fixture(scope="session", autouse=True)
def assembler():
    """The `ptxas` of the [aot] extra is the first that is found, by programs that tests run, too.
    That of a CUDA which is installed may be too old for what Triton writes.
    """
    folder = pathlib.Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder), prepend=os.pathsep)
        yield


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
