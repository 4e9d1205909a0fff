"""What a model does not read of a prompt is told: unknown words, and what is beyond its tokens."""

import json
import pathlib
import re

import pytest

import longlive_jax
from longlive_jax.data.caption import WORDS
from longlive_jax.text import tiny
from longlive_jax.text.tokenizer import PieceTokenizer

README = pathlib.Path(__file__).parents[1] / "README.md"
KNOWN = "a red circle moves left over a black background"
LONG = ", then ".join([KNOWN] * 13)  # 129 words


def note(prompt, text_len=tiny.TEXT_LEN):
    return tiny.tiny_tokenizer(text_len).note(prompt)


@pytest.mark.parametrize(
    "prompt", [KNOWN, KNOWN.upper() + "!", "red " * 39, "red, " * 39, "", "?!"]
)
def test_a_prompt_that_is_read_has_no_note(prompt):
    assert note(prompt) == ""


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a Fluffy cat", 'prompt "a Fluffy cat": the model does not know "Fluffy", "cat"'),
        ("cat cat (cat)", 'prompt "cat cat (cat)": the model does not know "cat"'),
        ("one two three four five six 7", '"two", "three", "four", "five", "six" and 1 more'),
        ("ein roter Kreis", '"ein", "roter", "Kreis"'),
        ("漢字" * 100, 'prompt "漢'),
        ("x" * 100_000, 'does not know "xxx'),
        ("red " * 40, 'only 39 of its 40 tokens are read: what follows "…red red red red'),
        (LONG, '"then", and only 39 of its 129 tokens are read: what follows "…'),
    ],
)
def test_a_note_says_what_is_not_read(prompt, said):
    found = note(prompt)
    assert said in found
    assert len(found) < 500 and "\n" not in found


@pytest.mark.parametrize("room", [1, 2, 7, 38])
def test_a_note_says_where_a_prompt_is_cut(room):
    words = [WORDS[i % len(WORDS)] for i in range(90)]
    found = re.search(r'what follows "…?([^"]*)" is left out', note(" ".join(words), room + 1))
    read = found[1].split()
    assert read and read == words[room - len(read) : room]


def test_pieces_smaller_than_words_are_counted_too():
    """Some tokenizers know every character of some alphabet, and no words."""
    pieces = lambda prompt: [ord(c) if c.isascii() else 1 for c in prompt]  # noqa: E731
    small = PieceTokenizer(pieces, eos=2, pad=0, text_len=11, unknown=1)
    assert small.note("ten chars!") == ""
    assert 'only 10 of its 11 tokens are read: what follows "ten chars.' in small.note(
        "ten chars.."
    )
    assert small.note("a ü b") == 'prompt "a ü b": the model does not know "ü"'
    everything = PieceTokenizer(pieces, eos=2, pad=0, text_len=11)
    assert everything.note("a ü b") == ""


def test_the_readme_names_the_words_of_the_tiny_model():
    text = README.read_text("utf-8")
    count, quoted = re.search(r"It reads (\d+) words[^>]*\n((?:> .*\n)+)", text).groups()
    named = quoted.replace("> ", " ").split()
    path = pathlib.Path(longlive_jax.__file__).parent / "models" / "tiny" / "tokenizer.json"
    vocabulary = json.loads(path.read_text("utf-8"))["model"]["vocab"]
    assert sorted(named) == sorted(vocabulary.keys() - set(tiny.SPECIALS))
    assert int(count) == len(named)
