"""A sample of the attack on files: what is damaged is loaded or refused, in every kind."""

import gc

import pytest
import scripts

COUNT = 20


@pytest.fixture(scope="module")
def attack():
    return scripts.load("attack_files")


@pytest.fixture(scope="module")
def base(attack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    attack.make_base(folder)
    return folder


@pytest.fixture(scope="module")
def readers(attack):
    return attack.Readers()


# Orbax closes its event loop when one array cannot be read, while TensorStore still reads others.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["config", "session", "safetensors", "lora", "pt", "media"])
def test_damaged_files_are_loaded_or_refused(attack, base, readers, kind):
    if kind == "pt":
        pytest.importorskip("torch")
    found = [attack.outcome(readers, kind, 0, number, base) for number in range(COUNT)]
    gc.collect()
    assert set(found) <= set(attack.FINE), found
    assert found.count("refused") > COUNT // 4  # else nothing was damaged


def test_other_exceptions_are_found(attack, base, readers, monkeypatch):
    def broken(self, path):
        raise KeyError("x")

    monkeypatch.setattr(attack.Readers, "lora", broken)
    assert attack.outcome(readers, "lora", 0, 0, base) == "raised KeyError: 'x'"
