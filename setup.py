"""Package metadata. Tool settings live in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "longlive_jax/version.py").read_text())[1]

# Upper bounds stand where the next major release of a package has broken us before, or would be the
# first of its kind: jax and its companions, PyAV, NumPy.
JAX = ">=0.10.2,<0.13"
JAX_TRITON = "jax-triton>=0.3.1,<0.5"
TOKAMAX = "tokamax>=0.0.12,<0.1"

EXTRAS = {
    # Running on NVIDIA GPUs.
    "cuda": [f"jax[cuda13]{JAX}", "triton>=3.6,<4", JAX_TRITON, TOKAMAX],
    # Reading official .pt and .pth checkpoints.
    "torch": ["torch>=2.6"],
    # Training: metrics for TensorBoard.
    "train": ["tensorboardX>=2.6"],
    # Compiling for GPUs that are not there: the CUDA plugin of jax's own version, and ptxas.
    # No CUDA libraries and no driver: set JAX_PLATFORMS=cpu beside it. Triton also brings the
    # interpreter in which tests run its kernels.
    "aot": [
        f"jax[cuda13-local]{JAX}",
        "nvidia-cuda-nvcc>=13,<14",
        "triton>=3.9,<4",
        JAX_TRITON,
    ],
    "test": [
        "beartype>=0.20",
        "hypothesis>=6.100",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff>=0.14",
        "tensorboardX>=2.6",
        TOKAMAX,
    ],
    # What results are compared with; without it these tests are skipped. On Python 3.11 this torch
    # comes without CUDA where CI runs; elsewhere it is a build of several GB, whose pin of Triton
    # excludes [aot].
    "parity": [
        "torch==2.13.0",
        "diffusers>=0.42",
        "transformers>=5.23",
        "peft>=0.21",
        "pillow>=11",
    ],
}

setup(
    name="longlive-jax",
    version=VERSION,
    description="Real-time, interactive, minutes-long video generation in JAX",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # A wheel with a top-level `kernels` would overwrite Hugging Face's package of that name.
    package_dir={"longlive_kernels": "kernels"},
    packages=[
        *find_packages(include=["longlive_jax", "longlive_jax.*"]),
        "longlive_kernels",
        *(f"longlive_kernels.{name}" for name in find_packages("kernels")),
    ],
    package_data={
        "longlive_jax": ["**/*.safetensors", "**/*.json", "**/*.model", "**/*.txt"],
        "longlive_kernels": ["README.md"],
    },
    install_requires=[
        f"jax{JAX}",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "tensorstore>=0.1.80",
        "numpy>=2,<3",
        "ml-dtypes>=0.5",
        "einops>=0.8",
        "jaxtyping>=0.3",
        "absl-py>=2.1",
        "ml-collections>=1.0",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tokenizers>=0.20",
        "av>=17,<20",
        "grain>=0.2.18",
        "rich>=13",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["longlive = longlive_jax.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
