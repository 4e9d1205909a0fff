"""Versions of JAX: what differs between them, and tracing for a GPU that is absent, lie in one
module each, which say what they cannot do.
"""

import ast
import pathlib
import sys
import threading
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import backend
from jax.interpreters import partial_eval
from longlive_kernels import absent_gpu, arch, jax_versions

ROOT = pathlib.Path(__file__).parents[1]
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
PRODUCT = [*KERNELS, *sorted((ROOT / "longlive_jax").rglob("*.py"))]

# What versions lack, deprecate or have another default of.
DIFFERENT = {
    "plgpu.load",
    "plgpu.transpose_ref",
    "plgpu.CompilerParams",
    "pl.core_map",
    "jax.__version_info__",
    "jax_triton.triton_call",
}


def name(path):
    return str(path.relative_to(ROOT))


def nodes(path, kind):
    return [x for x in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(x, kind)]


def used(path) -> set[str]:
    """Names with one dot, as they are written."""
    return {ast.unparse(x) for x in nodes(path, ast.Attribute) if isinstance(x.value, ast.Name)}


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_what_differs_between_versions_lies_in_one_module(path):
    found = used(path) & DIFFERENT
    if path.name == "jax_versions.py":
        assert {"plgpu.load", "plgpu.CompilerParams", "jax_triton.triton_call"} <= found
    else:
        assert not found
    for call in nodes(path, ast.Call):
        if ast.unparse(call.func) == "plgpu.kernel":
            options = {x.arg: ast.unparse(x.value) for x in call.keywords}
            assert options["compiler_params"].startswith("jax_versions.compiler_params(")


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_private_names_of_jax_lie_in_one_module(path):
    """Also those that are looked up by a string, and what stands in for others in tests."""
    documented = nodes(path, ast.Module | ast.ClassDef | ast.FunctionDef)
    documentation = {ast.get_docstring(x, clean=False) for x in documented}
    texts = {x.value for x in nodes(path, ast.Constant) if isinstance(x.value, str)}
    names = {alias.name for x in nodes(path, ast.Import) for alias in x.names}
    names |= {x.module for x in nodes(path, ast.ImportFrom) if x.module}
    private = [x for x in (texts - documentation) | names if "jax._src" in x]
    assert bool(private) == (path.name == "absent_gpu.py")
    assert "unittest" not in {x.partition(".")[0] for x in names}


def test_kernels_are_lowered_by_lane():
    params = jax_versions.compiler_params(approx_math=True)
    assert params.lowering_semantics == plgpu.LoweringSemantics.Lane
    assert params.approx_math


def test_a_target_is_the_default_device_for_a_while():
    real = backend.get_default_device
    with absent_gpu.target(absent_gpu.Kind("9.0")):
        assert arch.default() == 90
        with absent_gpu.target(absent_gpu.Kind("10.0")):
            assert arch.default() == 100
        assert arch.default() == 90
    with pytest.raises(KeyError), absent_gpu.target(absent_gpu.Kind("9.0")):
        raise KeyError
    assert arch.default() is None
    assert backend.get_default_device is real


def test_a_target_is_that_of_its_thread():
    seen = []
    with absent_gpu.target(absent_gpu.Kind("9.0")):
        other = threading.Thread(target=lambda: seen.append(arch.default()))
        other.start()
        other.join()
    assert seen == [None]


def test_what_was_traced_for_another_device_is_traced_again():
    """Inner programs, too."""
    traced = []

    @jax.jit
    def inner(x):
        traced.append(arch.default())
        return x

    program = jax.jit(lambda x: inner(x))
    x = jnp.zeros(3)
    program.trace(x)
    for capability in ("9.0", "10.0", "9.0"):
        with absent_gpu.target(absent_gpu.Kind(capability)):
            program.trace(x)
    assert traced == [None, 90, 100]


def test_jax_finds_cudnn_and_the_capability_of_the_target():
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    with absent_gpu.target(absent_gpu.Kind("10.3")):
        assert cudnn.check_cudnn_version() == absent_gpu.CUDNN
        assert [cudnn.check_compute_capability(x) for x in ("8.0", "10.3", "12.0")] == [1, 1, 0]
    assert not cudnn.check_compute_capability("8.0")


def test_without_private_names_a_sentence_says_what_cannot_be_compiled(monkeypatch):
    monkeypatch.setattr(absent_gpu, "CUDNN_MODULE", "jax.gone")
    with pytest.warns(UserWarning, match="cannot compile cuDNN's attention .* jax.gone has no"):
        with absent_gpu.target(absent_gpu.Kind("9.0")):
            assert arch.default() == 90  # all else can be
    monkeypatch.setattr(absent_gpu, "CUDNN_MODULE", "jax.nn")
    with pytest.warns(UserWarning, match="has no check_cudnn_version and no check_compute_cap"):
        with absent_gpu.target(absent_gpu.Kind("9.0")):
            pass
    monkeypatch.delattr(backend, "get_default_device")
    with pytest.raises(NotImplementedError, match="cannot trace kernels for a GPU that is absent"):
        with absent_gpu.target(absent_gpu.Kind("9.0")):
            pass


def test_triton_is_called_as_its_version_wants(monkeypatch):
    primitive, called, x = object(), [], jnp.zeros(3)

    def old(*arrays, kernel, out_shape, enable_fp_fusion=True):
        called.append((arrays, kernel, out_shape, enable_fp_fusion))

    def new(*arrays, kernel, out_type=None, backend_options=None):
        called.append((arrays, kernel, out_type, backend_options["enable_fp_fusion"]))

    library = types.SimpleNamespace(triton_kernel_call_p=primitive)
    monkeypatch.setitem(partial_eval.dce_rules, primitive, lambda used, equation: equation)
    for call in (old, new, new):
        module = types.SimpleNamespace(triton_call=call, triton_lib=library)
        monkeypatch.setitem(sys.modules, "jax_triton", module)
        jax_versions.triton_call(x, x, kernel="k", out_type="shape", enable_fp_fusion=False)
    assert called == [((x, x), "k", "shape", False)] * 3
    live = [[True]] if jax.__version_info__ >= (0, 12) else []
    assert partial_eval.dce_rules[primitive]([True], *live, "equation") == "equation"
