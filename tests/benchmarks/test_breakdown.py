"""The breakdown sees the work of every thread, and tells it apart."""

import threading

import pytest
import torch

from bivec import Encoder
from bivec.benchmarks.breakdown import GROUPS, breakdown, core_seconds
from bivec.engine import layers, ops


def test_work_in_another_thread_is_seen():
    x = torch.randn(600, 600)

    def run():
        thread = threading.Thread(target=lambda: [x @ x for _ in range(20)])
        thread.start()
        thread.join()
        torch.relu(x)

    found = breakdown(run, torch.device("cpu"))
    shares = {part["name"]: part["share"] for part in found["parts"]}
    assert next(iter(shares)) == "aten::mm"
    assert shares["aten::mm"] > 0.5 > shares["aten::clamp_min"] > 0
    assert next(part["calls"] for part in found["parts"] if part["name"] == "aten::mm") == 20
    assert found["work_s"] > 0
    assert found["wall_s"] > 0


@pytest.fixture(params=["float32", "int8+float32"])
def encoder(request, tiny_llama_folder):
    try:
        return Encoder.from_pretrained(tiny_llama_folder, dtype=request.param, device="cpu")
    except ValueError as error:
        pytest.skip(str(error))


def test_a_call_s_seconds_are_told_apart_and_are_all_there(encoder):
    texts = [f"{number} words and others " * 3 for number in range(20)]
    encoder.encode(texts)
    spent = core_seconds(lambda: encoder.encode(texts), encoder)
    assert tuple(spent) == GROUPS
    always = {"tokenisation", "products", "norm", "rotary", "attention", "packing and copies"}
    assert all(spent[group] > 0 for group in always)
    quantized = encoder.compute_dtype.is_quantized
    assert (spent["quantising and scaling"] > 0) == quantized
    # in floats a part of oneDNN's products
    assert (spent["activation"] > 0) == (quantized or not ops.onednn_multiplies(torch.float32))


def test_a_slow_step_is_found_in_its_group(encoder, monkeypatch):
    step = "quantize_rows" if encoder.compute_dtype.is_quantized else "rms_norm"
    fast, big = getattr(layers, step), torch.randn(700, 700)

    def slow(*arguments, **keywords):
        big @ big
        return fast(*arguments, **keywords)

    monkeypatch.setattr(layers, step, slow)
    spent = core_seconds(lambda: encoder.encode(["one text"]), encoder)
    most = max((group for group in GROUPS if group != "rest"), key=lambda group: spent[group])
    assert most == ("norm" if step == "rms_norm" else "quantising and scaling")
    assert getattr(layers, step) is slow  # what is wrapped meanwhile is put back


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_are_the_parts_on_cuda():
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    found = breakdown(lambda: [x @ x for _ in range(20)], torch.device("cuda"))
    assert found["parts"][0]["calls"] == 20
    assert found["parts"][0]["share"] > 0.9
    assert found["work_s"] < found["wall_s"]
