"""Prompt cleaning against what the reference makes of the same strings."""

import json
import pathlib

import pytest

from longlive_jax.text.clean import clean

INDEX = pathlib.Path(__file__).parent / "golden/longlive1/index.json"
CASES = json.loads(INDEX.read_text())["J_umt5"]["cleaning"]


@pytest.mark.parametrize("case", CASES, ids=[f"J_umt5-{i}" for i in range(len(CASES))])
def test_J_umt5_cleaning(case):
    assert clean(case["text"]) == case["whitespace"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ðŸ˜€ smiles", "😀 smiles"),
        ("itâ\x80\x99s", "it's"),
        ("CAFÉ\u00a0» and à\u00a0« and ‘café’”", "CAFÉ » and à « and 'café'\""),
        ("NÃO, MAÇÃ", "NÃO, MAÇÃ"),
        ("<i> &amp;lt; &amp;amp;lt;", "<i> < &lt;"),
        ("a lone \ud83d half", "a lone \ufffd half"),
        ("x² ½ Ⅷ", "x² ½ Ⅷ"),
    ],
    ids=["emoji", "c1", "guillemets", "tilde", "twice", "surrogate", "no-nfkc"],
)
def test_clean(text, expected):
    assert clean(text) == expected


@pytest.mark.parametrize("case", CASES, ids=[f"J_umt5-{i}" for i in range(len(CASES))])
def test_cleaning_twice_is_cleaning_once(case):
    once = clean(case["text"])
    assert clean(once) == once


def test_differs_from_ftfy_only_western_mojibake_is_repaired():
    cyrillic = "Ð¼Ð¸Ñ€"  # "мир" read as Windows-1252, which ftfy would restore
    assert clean(cyrillic) == cyrillic
