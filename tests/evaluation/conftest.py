"""Small files in each task's layout, and a random adapter of the tiny model beside transformers and PEFT's own."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


@pytest.fixture
def similarity_folder(tmp_path, sentence):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split, count in (("train", 30), ("dev", 20), ("test", 25)):
        rows = [f'{sentence()},"{sentence()}, {sentence()}",{place % 6}\n' for place in range(count)]
        (folder / f"small-{split}.csv").write_text("".join(rows))
    return folder


@pytest.fixture
def labelled_folder(tmp_path, sentence):
    """Three data sets: with a development split, without, and without any split; a word tells the label."""
    folder = tmp_path / "labelled"
    folder.mkdir()

    def write(name: str, count: int, labels: str) -> None:
        rows = [f"{labels[i % len(labels)]} {sentence()} mark{labels[i % len(labels)]}\n" for i in range(count)]
        (folder / name).write_text("".join(rows))

    for name, count in (("split.train", 60), ("split.dev", 24), ("split.test", 30)):
        write(name, count, "01")
    for name, count in (("three.train.all", 60), ("three.test.all", 30)):
        write(name, count, "abc")
    write("whole.all", 40, "01")
    return folder


@pytest.fixture
def text_file(tmp_path, sentence):
    path = tmp_path / "held-out.txt"
    path.write_text("\n".join(f"{sentence()} {sentence()}\n" for _ in range(30)))
    return path


@pytest.fixture(scope="session")
def adapted(tiny_llama_folder, tmp_path_factory):
    """The folder of a random adapter, and the causal model of transformers with it merged in."""
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    torch.manual_seed(11)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder, model.merge_and_unload().eval()
