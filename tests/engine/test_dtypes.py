"""Which arithmetic a name asks for, on which device."""

import itertools
import re
from dataclasses import replace

import pytest
import torch

from bivec.engine import dtypes, rates
from bivec.engine.config import parse_config
from bivec.engine.dtypes import ComputeDtype, choose_dtype

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


@pytest.fixture(autouse=True)
def any_processor(monkeypatch):
    """Whether this one multiplies integers is test_int8.py's matter."""
    monkeypatch.setattr(dtypes, "check_products", lambda: None)


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


@pytest.fixture
def measured(monkeypatch):
    """measured(float32, bfloat16): the GFLOP/s that are measured, on a processor that has bfloat16."""

    def measured(float32: float, bfloat16: float) -> None:
        monkeypatch.setattr(dtypes, "onednn_multiplies", lambda dtype: True)
        monkeypatch.setattr(dtypes, "product_rates", lambda config: (float32, bfloat16))

    return measured


@pytest.mark.parametrize(
    ("float32", "bfloat16", "name", "reason"),
    [
        (100, 204, "bfloat16", "measured 204 GFLOP/s on one core, float32 100"),
        (164, 84, "float32", "measured 164 GFLOP/s on one core, bfloat16 84"),
        (116, 100, "float32", "measured 116 GFLOP/s on one core, bfloat16 100"),
        # what is as fast but for what a measurement may be wrong by takes less memory
        (114, 100, "bfloat16", "measured 100 GFLOP/s on one core, float32 114, and float32 takes twice the memory"),
        (100, 100, "bfloat16", "measured 100 GFLOP/s on one core, float32 100"),
        (100, 110, "bfloat16", "measured 110 GFLOP/s on one core, float32 100"),
    ],
)
def test_auto_is_what_is_measured_to_be_faster(float32, bfloat16, name, reason, measured):
    measured(float32, bfloat16)
    assert choose_dtype("auto", CPU, CONFIG) == ComputeDtype(name, dtypes.DTYPES[name], reason)
    beside = choose_dtype("int8", CPU, CONFIG)
    assert (beside.name, beside.reason) == (f"int8+{name}", f"asked for; beside it {name}: {reason}")


def test_a_processor_without_bfloat16_computes_in_float32(measured, monkeypatch):
    measured(100, 204)
    monkeypatch.setattr(dtypes, "onednn_multiplies", lambda dtype: dtype is torch.float32)
    chosen = choose_dtype("auto", CPU, CONFIG)
    assert (chosen.name, chosen.reason) == ("float32", "oneDNN does not multiply bfloat16 on this processor")


def test_rates_are_the_best_of_several_in_turns_on_one_core(monkeypatch, cores):
    """Each product is slow but for one time, float32 takes twice as long, and so do the products of many inputs."""
    clock, calls = [0.0], []

    class Product:
        def __init__(self, weight, bias):
            self.weight = weight

        def __call__(self, x):
            out, inputs = self.weight.shape
            assert self.weight.dtype is x.dtype
            assert x.shape == (512, inputs)
            calls.append((out, inputs, x.dtype, torch.get_num_threads()))
            slow = 1.0 if calls.count(calls[-1]) == 4 else 1.5 + len(calls)
            clock[0] += slow * out * inputs * (2 if x.dtype is torch.float32 else 1) * (2 if inputs > 1000 else 1)

    monkeypatch.setattr(rates, "PackedLinear", Product)
    monkeypatch.setattr(rates, "_CLOCKS", (lambda: clock[0], lambda: 0.0))
    cores(4)
    config = replace(CONFIG, hidden_size=4096, intermediate_size=192)
    float32, bfloat16 = rates.product_rates(config)
    # two of three products have many inputs
    assert bfloat16 == pytest.approx(2e-9 * 512 / (1 / 3 + 2 / 3 * 2))
    assert float32 == pytest.approx(bfloat16 / 2)
    turns = [(640, 192, torch.float32, 1), (640, 192, torch.bfloat16, 1)]
    turns += [(64, 2048, torch.float32, 1), (64, 2048, torch.bfloat16, 1)]
    assert calls == [turn for pair in (turns[:2], turns[2:]) for turn in pair * (len(calls) // 4)]
    assert torch.get_num_threads() == 4
    num_calls = len(calls)
    assert rates.product_rates(config) == (float32, bfloat16)
    assert len(calls) == num_calls


def test_a_clock_that_stands_still_is_not_believed(monkeypatch):
    """Some systems count a thread's time in hundredths of a second, and say that they do it in billionths."""
    clock = itertools.count()
    monkeypatch.setattr(rates, "_CLOCKS", (lambda: 0.0, lambda: float(next(clock))))
    config = replace(CONFIG, hidden_size=128, intermediate_size=320)
    assert rates.product_rates(config) == pytest.approx((2e-9 * 512 * 128 * 320,) * 2)


def test_where_bfloat16_is_slow_auto_is_float32(python):
    """oneDNN can be told to leave the processor's bfloat16 alone; it then widens to float32 and multiplies that."""
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        pytest.skip("the processor has no bfloat16 instructions that oneDNN could be told to leave alone")
    program = """
import json
import torch
from bivec.engine.config import parse_config
from bivec.engine.dtypes import choose_dtype

sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
others = {"model_type": "llama", "vocab_size": 400, "num_hidden_layers": 3, "max_position_embeddings": 256}
chosen = choose_dtype("auto", torch.device("cpu"), parse_config(sizes | others))
print(json.dumps([chosen.name, chosen.reason]))
"""
    name, reason = python(program, ONEDNN_MAX_CPU_ISA="AVX512_CORE")
    assert name == "float32", reason
    assert re.fullmatch(r"measured [\d,]+ GFLOP/s on one core, bfloat16 [\d,]+", reason)
