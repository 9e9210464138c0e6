"""Which arithmetic a name asks for, on which device."""

import pytest
import torch

from bivec.engine.config import parse_config
from bivec.engine.dtypes import choose_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = parse_config(
    {
        "model_type": "llama",
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability): what torch says that the GPU has."""

    def gpu(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")

    return gpu


@pytest.mark.parametrize(
    ("dtype", "device", "name", "floats"),
    [
        ("float32", CPU, "float32", torch.float32),
        (torch.bfloat16, CPU, "bfloat16", torch.bfloat16),
        ("float16", CUDA, "float16", torch.float16),
        ("int8+float32", CPU, "int8+float32", torch.float32),
        ("int8+bfloat16", CPU, "int8+bfloat16", torch.bfloat16),
        ("float8", CUDA, "float8+bfloat16", torch.bfloat16),
        ("float8+bfloat16", CUDA, "float8+bfloat16", torch.bfloat16),
    ],
)
def test_a_name_chooses_the_same_again(dtype, device, name, floats, gpu):
    gpu((8, 9))
    chosen = choose_dtype(dtype, device, CONFIG)
    assert (chosen.name, chosen.floats) == (name, floats)
    assert chosen.is_quantized == ("8" in name)
    again = choose_dtype(chosen.name, device, CONFIG)
    assert (again.products, again.floats) == (chosen.products, chosen.floats)


@pytest.mark.parametrize(
    ("dtype", "device", "message"),
    [
        ("int8+float16", CPU, "dtype must be one of auto, .*, got 'int8\\+float16'"),
        ("int8+", CPU, "dtype must be one of auto, .*, got 'int8\\+'"),
        ("float8+float32", CUDA, "dtype must be one of auto, .*, got 'float8\\+float32'"),
        (torch.float64, CPU, "dtype must be one of auto, .*, got 'torch.float64'"),
        ("float16", CPU, "float16 needs a CUDA device; on the CPU use float32 or bfloat16"),
        ("int8", CUDA, "int8 needs the CPU, got the device cuda:0; on CUDA use float8"),
        ("int8+bfloat16", CUDA, "int8 needs the CPU, got the device cuda:0; on CUDA use float8"),
        ("float8+bfloat16", CPU, "float8 needs a CUDA device, got the device cpu; on the CPU use int8"),
        ("float8", CUDA, "float8 needs a GPU of capability 8.9 or more, got 8.6 \\(A GPU\\)"),
    ],
)
def test_what_a_device_does_not_compute_in_is_an_error(dtype, device, message, gpu):
    gpu((8, 6))
    with pytest.raises(ValueError, match=message):
        choose_dtype(dtype, device, CONFIG)
