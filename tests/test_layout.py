"""The house rules, measured: sizes, imports, and what is printed or written down where."""

import ast
import importlib.metadata
import pathlib
import re
import stat

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("longlive_jax", "kernels", "experiments")
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
LIBRARY = [path for path in SOURCES if not path.is_relative_to(ROOT / "experiments")]

MAX_LINES, MAX_FUNCTION, MAX_ARGUMENTS = 600, 80, 9
# Kernels may be longer: they are read as one piece.
MAX_KERNEL_FUNCTION = 160

# The lower half of imports goes one way; each package may import those to its right.
ORDER = ("experiments", "longlive_jax", "longlive_kernels")
FOLDER = {"longlive_kernels": "kernels"}

# Tokens per latent frame and per chunk of the presets: computed in config.py, written nowhere.
PRESET_COUNTS = {880, 1560, 4680, 7040}


def name(path):
    return str(path.relative_to(ROOT))


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path):
    return [
        node
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def imports(path):
    """Top-level names of the packages that a file imports."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


every_source = pytest.mark.parametrize("path", SOURCES, ids=name)


@every_source
def test_files_and_functions_fit(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines < MAX_LINES
    limit = MAX_KERNEL_FUNCTION if path.is_relative_to(ROOT / "kernels") else MAX_FUNCTION
    for function in functions(path):
        assert function.end_lineno - function.lineno + 1 < limit, function.name
        arguments = function.args
        every = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
        # What a Triton kernel is compiled for is not what it is called with.
        count = sum(ast.unparse(a.annotation or a) != "tl.constexpr" for a in every)
        count -= bool(arguments.args) and arguments.args[0].arg in ("self", "cls")
        assert count <= MAX_ARGUMENTS, function.name


@every_source
def test_files_say_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(tree(path)), "no module docstring"
    assert path.name not in ("utils.py", "helpers.py", "misc.py", "common.py")


@every_source
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    above = [other for other in ORDER if FOLDER.get(other, other) == package]
    forbidden = set(ORDER[: ORDER.index(above[0])]) | {"kernels", "tests", "pytest"}
    assert not forbidden & set(imports(path))


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_the_library_neither_prints_nor_reads_the_environment(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"):
            # The folder for caches is looked up where the system says it is, and nothing but the
            # environment tells XLA how many threads to make.
            assert path.name in ("cache_dir.py", "cpu_devices.py"), f"line {node.lineno}"


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_counts_that_follow_from_a_preset_are_not_written_down(path):
    if path.name == "config.py":
        return
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            assert node.value not in PRESET_COUNTS, f"line {node.lineno}"


def test_the_top_level_is_what_it_was_meant_to_be():
    allowed = {
        *("longlive_jax", "kernels", "experiments", "tests"),
        *("setup.py", "pyproject.toml", "README.md", "LICENSE"),
        *(".ci", ".gitignore", ".pre-commit-config.yaml"),
    }
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    passing = {".git", "build", *ignored}
    found = {
        path.name
        for path in ROOT.iterdir()
        if path.name not in passing and not path.name.endswith(".egg-info")
    }
    assert found <= allowed


def test_ci_runs_the_command_that_the_readme_gives():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert "grep -o -m1 'python -m pytest -q [^`]*-m \"not aot\"' README.md" in script.read_text()
    found = re.findall(r'python -m pytest -q [^`\n]*-m "not aot"', (ROOT / "README.md").read_text())
    assert len(set(found)) == 1


def test_the_package_is_installed_under_its_two_names():
    import longlive_kernels

    import longlive_jax.version

    assert longlive_kernels.__doc__
    assert importlib.metadata.version("longlive-jax") == longlive_jax.version.__version__
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="longlive")
    assert script.value == "longlive_jax.cli:main"


def test_weights_in_the_package_are_small():
    sizes = {path: path.stat().st_size for path in (ROOT / "longlive_jax").rglob("*.safetensors")}
    assert sum(sizes.values()) <= 12e6


def test_golden_files_are_small():
    sizes = [path.stat().st_size for path in (ROOT / "tests" / "golden").rglob("*.npz")]
    assert sum(sizes) <= 15e6
