"""Which LoRAs are asked for, by flags and in Python; and flags that are there twice."""

import numpy as np
import pytest

from longlive_jax import cli, lora_files
from longlive_jax.errors import InputError
from longlive_jax.lora_files import LoraFile


def test_the_flag_is_a_file_and_maybe_a_strength(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "b=2.safetensors", "c=3", "both", "both=4"):
        (tmp_path / name).touch()
    for text, path, strength in (
        ("a.safetensors", "a.safetensors", 1),
        ("a.safetensors=0.5", "a.safetensors", 0.5),
        ("a.safetensors=-1e1", "a.safetensors", -10),
        ("b=2.safetensors", "b=2.safetensors", 1),
        ("b=2.safetensors=3", "b=2.safetensors", 3),
        ("c=3", "c=3", 1),
        ("both=4", "both", 4),
    ):
        assert lora_files.parse(text) == LoraFile(path, strength)
    for text, said in (
        ("none=0.5", "--lora: there is no none$"),
        (
            "a.safetensors=high",
            "is no a.safetensors=high; a strength is a number, not 'high'",
        ),
        ("a.safetensors=nan", "strength of the LoRA a.safetensors is a finite number, not nan"),
        ("a.safetensors=-inf", "finite number, not -inf"),
        ("a.safetensors=1e300", "finite number"),
        ("", "say which file"),
        ("=1", "there is no =1"),
        ("x" * 5000, "there is no"),
    ):
        with pytest.raises(InputError, match=said):
            lora_files.parse(text)


def test_the_choice_in_python(tmp_path):
    path = tmp_path / "a"
    one = (LoraFile(str(path)),)
    for choice in (str(path), path, [path], one, one[0], [(path, 1)], (path, 1.0), [[path, 1]]):
        assert lora_files.listed(choice) == one
    assert lora_files.listed(None) is None and lora_files.listed([]) == ()
    several = [(path, np.float32(0.5)), "b", (path, -1)]
    assert [x.strength for x in lora_files.listed(several)] == [0.5, 1, -1]
    for choice in (3, {"a": 1}, [3], [("a", "b")], [("a", True)], [("a", 1, 2)], [("a", np.nan)]):
        with pytest.raises(InputError, match="LoRA"):
            lora_files.listed(choice)
    with pytest.raises(InputError, match="finite number, not inf"):
        lora_files.listed([("a", 10**400)])


@pytest.mark.parametrize("command", ["bench", "eval", "generate"])
def test_every_lora_reaches_load(tmp_path, command):
    for name in ("a=b", "c"):
        (tmp_path / name).touch()
    asked = {}

    def load(name, **choices):
        asked.update(choices)
        raise InputError("enough")

    flags = ["--prompt=a", f"--output={tmp_path}/a.mp4"] if command == "generate" else []
    flags += [f"--lora={tmp_path}/a=b", f"--lora={tmp_path}/c=-0.5"]
    assert cli.run([command, *flags], load) == 2
    assert asked["lora"] == (LoraFile(f"{tmp_path}/a=b"), LoraFile(f"{tmp_path}/c", -0.5))


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("generate", "--model=tiny"),
        ("generate", "--seed=1"),
        ("generate", "--noclean_pass"),
        ("generate", "--recache=keep"),
        ("bench", "--seconds=1"),
        ("eval", "--model=tiny"),
        ("merge-lora", "--alpha=1"),
        ("convert", "--to=x"),
        ("quantize", "--output=x"),
        ("plan", "--seconds=1"),
        ("data", "--dir=x"),
    ],
)
def test_a_flag_of_one_value_is_refused_twice(capsys, command, flag):
    assert cli.run([command, flag, flag], load=lambda *_, **__: pytest.fail("begun")) == 2
    name = flag.partition("=")[0].replace("--no", "--")
    assert f"longlive: {name} has one value and is there 2 times" in capsys.readouterr().err
