"""The script that breaks lines: what it breaks, where, and which tests it asks."""

import ast
import json
import pathlib
import textwrap

import mutants
import pytest
import scripts
from absl import app

ROOT = pathlib.Path(__file__).parents[1]
mutations = scripts.load("mutations")
BROKEN = """
def mean(x: int, *, scale=2.0):
    '''The mean, 1 of 2.'''
    check(x, strict=True)
    if x < 1 and scale:
        raise ValueError(f"not {x + 1}")
    x = f(x) * 3
    y = g(-1, how=x)
    return y
"""


def changes(source):
    """Kind, before and after of every mutant."""
    return {(m.kind, m.before, m.after) for m in mutants.find(textwrap.dedent(source))}


def test_every_kind_of_fault_is_found_where_it_is():
    assert changes(BROKEN) == {
        ("constant", "2.0", "3.0"),
        ("keyword", "check(x, strict=True)", "check(x)"),
        ("constant", "True", "False"),
        ("removal", "check(x, strict=True)", "pass"),
        ("condition", "x < 1 and scale", "not (x < 1 and scale)"),
        ("logic", "x < 1 and scale", "(x < 1 or scale,)[0]"),
        ("comparison", "x < 1", "x <= 1"),
        ("constant", "1", "2"),
        ("removal", 'raise ValueError(f"not {x + 1}")', "pass"),
        ("removal", "x = f(x) * 3", "pass"),
        ("arithmetic", "f(x) * 3", "f(x) / 3"),
        ("call", "f(x)", "x"),
        ("constant", "3", "4"),
        ("keyword", "g(-1, how=x)", "g(-1)"),
        ("call", "g(-1, how=x)", "(-1,)[0]"),
    }


def test_a_fault_changes_its_own_piece_alone():
    """Also after letters that take more than one byte."""
    source = 'a = "ü" if b == 1 else 2  # ä\nc = 3\n'
    found = {mutant.apply(source) for mutant in mutants.find(source)}
    assert found == {
        source.replace("b == 1", "b != 1"),
        source.replace("b == 1", "not (b == 1)"),
        source.replace("b == 1", "b == 2"),
        source.replace("else 2", "else 3"),
        source.replace("c = 3", "c = 4"),
    }


@pytest.mark.parametrize("file", mutations.TESTS)
def test_every_fault_of_a_file_is_python(file):
    source = (ROOT / file).read_text("utf-8")
    found = mutants.find(source)
    assert found
    for mutant in found[:: max(1, len(found) // 20)]:
        ast.parse(mutant.apply(source))


def test_files_and_their_tests_exist():
    """Every file of the packages that are broken has tests, and every name is one of a test."""
    for file, names in mutations.TESTS.items():
        assert (ROOT / file).is_file()
        for name in names:
            assert (ROOT / "tests" / f"test_{name}.py").is_file(), name
    folders = ("dit", "vae", "train", "convert")
    library = [path for name in folders for path in (ROOT / "longlive_jax" / name).glob("*.py")]
    library += [path for path in (ROOT / "kernels").rglob("reference.py")]
    written = {str(path.relative_to(ROOT)) for path in library if path.stat().st_size}
    assert written <= mutations.TESTS.keys()


def test_a_sample_is_the_same_again_and_has_all_kinds():
    sources = {f"{name}.py": BROKEN for name in "abc"}
    few, more = (mutations.sample(sources, count, 0) for count in (5, 40))
    assert more[:5] == few and len(set(more)) == 40
    assert {mutant.kind for _, mutant in more} == set(mutants.KINDS)
    everything = mutations.sample(sources, 1000, 1)
    assert len(everything) == 3 * len(mutants.find(BROKEN))
    assert mutations.sample(sources, 5, 1) != few


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A project of one function and one test of it."""
    root = tmp_path / "root"
    for folder in ("longlive_jax", "kernels", "experiments", "tests"):
        (root / folder).mkdir(parents=True)
    (root / "longlive_jax" / "__init__.py").write_text("")  # else what is installed comes first
    (root / "longlive_jax" / "one.py").write_text("def f(x):\n    return x + 1\n")
    (root / "tests" / "test_one.py").write_text(
        "from longlive_jax.one import f\n\n\ndef test_f():\n    assert f(0) == 1\n"
    )
    for file in ("pyproject.toml", "README.md"):
        (root / file).write_text("")
    monkeypatch.setattr(mutations, "ROOT", root)
    return root


def test_a_fault_is_found_or_survives_and_is_taken_back(checkout, tmp_path):
    copy = mutations.Copy(tmp_path, limit=60)
    source = (checkout / "longlive_jax" / "one.py").read_text()
    file = "longlive_jax/one.py"
    assert copy.test("tests/test_one.py") == (mutations.SURVIVED, "")
    constant, plus = sorted(mutants.find(source), key=lambda mutant: mutant.kind)[::-1][:2]
    assert (constant.kind, plus.kind) == ("constant", "arithmetic")
    with copy.broken(file, constant):
        assert copy.test("tests/test_one.py") == (mutations.FOUND, "tests/test_one.py::test_f")
    assert (copy.tree / file).read_text() == source
    results = mutations.Results(tmp_path / "found.json", {file: source})
    mutations.check_sound(copy, "tests/test_one.py::test_f", results)
    assert list(results.sound) == ["tests/test_one.py::test_f"]
    (copy.tree / file).write_text(constant.apply(source))
    with pytest.raises(RuntimeError, match="test_f fails, too"):
        mutations.check_sound(
            copy,
            "tests/test_one.py::test_f",
            mutations.Results(tmp_path / "other.json", {file: source}),
        )
    (copy.tree / file).write_text(source)
    assert copy.test("tests/test_one.py") == (mutations.SURVIVED, "")


def test_results_go_on_where_they_were(tmp_path):
    path, sources = tmp_path / "runs" / "found.json", {"a.py": BROKEN}
    (file, mutant), (_, other) = mutations.sample(sources, 2, 0)
    results = mutations.Results(path, sources)
    facts = (file, mutant.line, mutant.kind, mutant.before, mutant.after)
    results.add(mutations.Result(*facts, mutations.SURVIVED, 2.0, ""))
    again = mutations.Results(path, sources)
    assert again.has(file, mutant) and not again.has(file, other)
    assert json.loads(path.read_text())["found_share"] == 0.0
    with pytest.raises(app.UsageError, match="other sources"):
        mutations.Results(path, {"a.py": BROKEN + "\n"})
