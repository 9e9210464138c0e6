"""Adapters that are damaged or hostile: one line that names the file, and nothing of them is run or followed."""

import json
import os
import pickle

import pytest

from bivec import Encoder
from bivec.engine import json_files
from bivec.engine.run_folder import RunDescription

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def adapter(make_adapter, tiny_llama_folder, tmp_path):
    return make_adapter(tiny_llama_folder, tmp_path / "adapter")


def edit(adapter, **changes):
    values = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(values | changes))


def load(folder):
    return Encoder.from_pretrained(folder, dtype="float32", device="cpu")


def refusal(error, folder):
    """The one line with which a folder is refused."""
    with pytest.raises(error) as caught:
        load(folder)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("keep", [0, 7, 100, 20_000], ids=["empty", "short header", "torn header", "torn data"])
def test_a_truncated_file_is_refused(adapter, keep):
    content = (adapter / TENSORS).read_bytes()
    assert len(content) > keep
    (adapter / TENSORS).write_bytes(content[:keep])
    line = refusal(ValueError, adapter)
    assert line.startswith(f"{adapter / TENSORS} is not a whole safetensors file")
    assert line.endswith("copy or download it again")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not valid JSON"),
        (b'{"peft_type": "LO', "is not valid JSON"),
        (b'{"peft_type": "L\xd6RA"}', "is not valid JSON: 'utf-8' codec can't decode byte 0xd6"),
        (b"[" * 100_000 + b"]" * 100_000, "nests deeper than 64 levels"),
        (b'{"r": ' * 70 + b"8" + b"}" * 70, "nests deeper than 64 levels"),
        (b'["LORA"]', "must hold a JSON object, got list"),
        (b'{"r": "%s"}' % (b"8" * 5000), "must have at most 4,000 bytes"),
    ],
    ids=["empty", "torn", "latin-1", "lists", "objects", "no object", "large"],
)
def test_a_configuration_that_cannot_be_read_is_refused(adapter, monkeypatch, content, reason):
    monkeypatch.setattr(json_files, "_MOST_BYTES", 4000 if len(content) < 10_000 else 2**26)
    (adapter / CONFIG).write_bytes(content)
    assert refusal(ValueError, adapter).startswith(f"{adapter / CONFIG} {reason}")


@pytest.mark.parametrize("described", [False, True], ids=[CONFIG, "bivec.json"])
@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("../gone", FileNotFoundError, "names a base that is not to be had: ../gone is no folder"),
        ("/gone/base", FileNotFoundError, "names a base that is not to be had: /gone/base is no folder"),
        ("https://host/base", FileNotFoundError, "names a base that is not to be had: https://host/base is no folder"),
        ("a b", FileNotFoundError, "names a base that is not to be had: a b is no folder, and cannot be a hub id"),
        ("nul\0", FileNotFoundError, "names a base that is not to be had: nul\0 is no folder, and cannot be a hub id"),
        ("~nobody-of-this-name/x", ValueError, "names '~nobody-of-this-name/x', which cannot be a folder"),
        ("a" * 5000, (ValueError, FileNotFoundError), "names "),  # the former where Python says that it is too long
    ],
    ids=["beside", "absolute", "url", "spaces", "nul", "home", "long"],
)
def test_a_base_that_is_not_there_is_named_with_the_file_and_the_remedy(adapter, name, error, reason, described):
    edit(adapter, base_model_name_or_path=name)
    if described:
        RunDescription("simcse", name).write(adapter)
    line = refusal(error, adapter)
    assert line.startswith(f"{adapter / ('bivec.json' if described else CONFIG)} {reason}")
    if error is FileNotFoundError:
        assert line.endswith(f"give its folder as the model and {adapter} as an adapter")


@pytest.mark.parametrize("name", ["", None, 3, ["base"]])
def test_a_base_must_be_named(adapter, name):
    edit(adapter, base_model_name_or_path=name)
    line = refusal(ValueError, adapter)
    assert line == f"{adapter / CONFIG}: base_model_name_or_path must be a folder or a hub id, got {name!r}"


@pytest.mark.parametrize("name", ["./adapter", "{folder}", "{link}"])
def test_an_adapter_that_is_its_own_base_is_refused(adapter, tmp_path, name):
    (tmp_path / "link").symlink_to(adapter)
    edit(adapter, base_model_name_or_path=name.format(folder=adapter, link=tmp_path / "link"))
    assert "leads back to itself" in refusal(ValueError, adapter)


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "adapter_model.pt"])
def test_a_pickle_is_never_opened(adapter, tmp_path, name):
    before = load(adapter).encode("fox")
    (adapter / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (load(adapter).encode("fox") == before).all()
    (adapter / TENSORS).unlink()
    line = refusal(FileNotFoundError, adapter)
    assert line.startswith(
        f"{adapter / TENSORS} does not exist; an adapter must be in safetensors: a pickle is refused"
    )
    assert not (tmp_path / "sprung").exists()
