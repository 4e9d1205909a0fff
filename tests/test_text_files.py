"""Texts as editors save them, and folders as operating systems leave them."""

import codecs
import json
import pathlib

import pytest

from longlive_jax import documents, listing, story
from longlive_jax.data.caption import WORDS
from longlive_jax.errors import InputError
from longlive_jax.text import tokenizer
from longlive_jax.train import prompts

MARKED = {
    "utf-8": ("", "utf-8"),
    "utf-8 with a mark": ("\ufeff", "utf-8"),
    "utf-16, little": ("\ufeff", "utf-16-le"),
    "utf-16, big": ("\ufeff", "utf-16-be"),
    "utf-32, little": ("\ufeff", "utf-32-le"),
    "utf-32, big": ("\ufeff", "utf-32-be"),
}
ENDS = {"unix": "\n", "windows": "\r\n", "old mac": "\r"}
HIDDEN = [
    *(".DS_Store", "._0.json", "._cat.png", "Thumbs.db", "thumbs.db", "desktop.ini", "Desktop.ini"),
    *("@eaDir", "__MACOSX", "$RECYCLE.BIN", "lost+found", ".ipynb_checkpoints"),
]

every_encoding = pytest.mark.parametrize("encoding", MARKED)
every_end = pytest.mark.parametrize("end", ENDS)


def write(path, text, encoding, end):
    mark, codec = MARKED[encoding]
    path.write_bytes((mark + text.replace("\n", ENDS[end])).encode(codec))
    return path


@every_end
@every_encoding
def test_a_text_is_the_same_in_every_encoding(tmp_path, encoding, end):
    path = write(tmp_path / "a.txt", "a dot\nein Häschen\n", encoding, end)
    assert documents.read_text(path) == "a dot\nein Häschen\n"


@every_encoding
def test_json_is_the_same_in_every_encoding(tmp_path, encoding):
    path = write(tmp_path / "a.json", '{\n"a": "ü"\n}', encoding, "windows")
    assert documents.read(path) == {"a": "ü"}


@every_encoding
def test_stories_are_the_same_in_every_encoding(tmp_path, encoding):
    (tmp_path / "s").mkdir()
    lists = write(tmp_path / "a.jsonl", '{"prompts": ["one", "two"]}\n', encoding, "windows")
    lines = write(tmp_path / "a.txt", "one\n\ntwo\n", encoding, "windows")
    write(tmp_path / "s" / "0.json", '{"caption": "one"}', encoding, "windows")
    write(tmp_path / "s" / "shot_durations.txt", "6\n", encoding, "windows")
    assert [draft.prompts for draft in story.read(lists)] == [("one", "two")]
    assert [draft.prompt for draft in story.read(lines)] == ["one", "two"]
    (shots,) = story.read(tmp_path / "s")
    assert (shots.captions, shots.chunks) == (("one",), (6,))


@every_encoding
def test_prompts_to_train_with_are_the_same_in_every_encoding(tmp_path, encoding):
    path = write(tmp_path / "a.txt", "one\n\ntwo\n", encoding, "windows")
    assert [line.prompts for line in prompts.read(path)] == [["one"], ["two"]]


def test_a_tokenizer_may_begin_with_a_mark(tmp_path):
    import longlive_jax

    package = pathlib.Path(longlive_jax.__file__).parent
    (shipped,) = package.rglob("tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes(codecs.BOM_UTF8 + shipped.read_bytes())
    ids, mask = tokenizer.load(tmp_path, 8)(WORDS[:2])
    assert mask.any() and ids.any()


@pytest.mark.parametrize("data", [b"caf\xe9", codecs.BOM_UTF16_LE + b"a"])
def test_another_encoding_is_one_sentence(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(InputError, match="a.txt is not in UTF-8: save it as UTF-8 text"):
        documents.read_text(tmp_path / "a.txt")


def test_a_text_has_a_largest_size(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 11)
    assert documents.read_text(tmp_path / "a.txt", limit=11) == "a" * 11
    with pytest.raises(InputError, match="more than 10 bytes"):
        documents.read_text(tmp_path / "a.txt", limit=10)


def litter(folder):
    """Leave in a folder what systems leave there: files, and folders with more of them."""
    for name in HIDDEN:
        path = folder / name
        if "." in name[1:] or name == ".DS_Store":
            path.write_bytes(b"\0\5\x16\7")
        else:
            path.mkdir()
            (path / "0.json").write_bytes(b"\0\5\x16\7")


def test_what_systems_leave_behind_is_not_shown(tmp_path):
    litter(tmp_path)
    assert listing.shown(tmp_path) == []
    for name in ("b.json", "a.txt", "Thumbs.db.json"):
        (tmp_path / name).touch()
    assert [path.name for path in listing.shown(tmp_path)] == ["Thumbs.db.json", "a.txt", "b.json"]
    assert [path.name for path in listing.shown(tmp_path, "*.txt")] == ["a.txt"]


def test_captions_among_what_systems_leave_behind(tmp_path):
    for name in ("a", "b"):
        sample = tmp_path / "caption" / name
        sample.mkdir(parents=True)
        litter(sample)
        (sample / "0.json").write_text(json.dumps({"caption": f"shot of {name}"}))
    litter(tmp_path)
    litter(tmp_path / "caption")
    found = story.read(tmp_path)
    assert [(draft.name, draft.captions) for draft in found] == [
        ("a", ("shot of a",)),
        ("b", ("shot of b",)),
    ]
