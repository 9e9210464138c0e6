"""Encoders in eight bits of checkpoints that are not as they should be: the exact result, or an error that says why."""

import re
import shutil
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bivec import Encoder
from bivec.engine.agreement import cosines, describe_with_cost
from bivec.engine.int8 import check_products
from bivec.engine.packing import PackedBatch

TEXTS = ["the quick brown fox", "jumps over", "the lazy dog, which sleeps and does not see it", "fox"]


@pytest.fixture(scope="module", autouse=True)
def _multiplies():
    try:
        check_products()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def changed(tiny_llama_folder, tmp_path):
    """changed(change): the folder of the tiny model, after `change(tensors)`."""

    def write(change: Callable[[dict[str, torch.Tensor]], object]):
        folder = tmp_path / "changed"
        shutil.copytree(tiny_llama_folder, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return write


def layer(name: str) -> str:
    return f"model.layers.1.{name}.weight"


LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def in_float32_and_int8(folder) -> list[Encoder]:
    return [Encoder.from_pretrained(folder, dtype=dtype) for dtype in ("float32", "int8+float32")]


def assert_near_float32(folder):
    exact, found = (encoder.encode(TEXTS) for encoder in in_float32_and_int8(folder))
    assert np.isfinite(found).all()
    assert cosines(found, exact)[0].min() > 0.99


def test_channels_of_zeros(changed):
    def change(tensors):
        for name in LINEARS:
            tensors[layer(name)][3] = 0.0

    assert_near_float32(changed(change))


def test_tokens_and_linears_of_zeros(changed):
    """Rows of zeros from the first norm on, and in every later layer behind outputs of zeros."""

    def change(tensors):
        tensors["model.embed_tokens.weight"][5:200:2] = 0.0
        for name in ("self_attn.v_proj", "mlp.up_proj"):
            tensors[layer(name)].zero_()

    folder = changed(change)
    assert_near_float32(folder)
    exact, found = in_float32_and_int8(folder)
    batch = PackedBatch.from_sequences([[5], [7, 9, 11]])
    for ours, theirs in zip(*(one.runner.all_hidden_states(batch) for one in (found, exact)), strict=True):
        assert ours.isfinite().all()
        assert torch.equal(ours.eq(0).all(dim=1), theirs.eq(0).all(dim=1))


def dominating(scale):
    """A channel of the normed states so many times as large, its weights as much smaller: the same function."""

    def change(tensors):
        for name, tensor in tensors.items():
            if name.endswith("layernorm.weight"):
                tensor[7] *= scale
            elif name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
                tensor[:, 7] /= scale

    return change


def test_what_a_dominating_channel_costs_is_seen(changed):
    load = partial(Encoder.from_pretrained, changed(dominating(50.0)))
    found = describe_with_cost(load, dtype="int8+float32", attention="auto", max_length=64)
    assert float(re.search(r"least (-?\d\.\d+)", found["backend"]["cosine with float32"])[1]) < 0.98


def test_a_channel_that_drowns_all_others_is_an_error_with_the_remedy(changed):
    folder = changed(dominating(1e6))
    Encoder.from_pretrained(folder, dtype="float32")
    with pytest.raises(ValueError, match=r"one channel of the states drowns the others in int8: load the model in a"):
        Encoder.from_pretrained(folder, dtype="int8")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [layer("mlp.down_proj"), "model.embed_tokens.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(changed, name, wrong):
    folder = changed(lambda tensors: tensors[name].view(-1)[7:8].fill_(wrong))
    with pytest.raises(ValueError, match=rf"{name} in model.safetensors holds NaN or infinity"):
        Encoder.from_pretrained(folder, dtype="int8")


@pytest.mark.parametrize("name", ["self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_huge_and_tiny_weights_give_what_float32_does(changed, name, scale):
    """Squares of 1e30 are infinite, and a norm of them is zero, in float32 as in eight bits."""
    folder = changed(lambda tensors: tensors[layer(name)].mul_(scale))
    (exact, their_reasons, _), (found, reasons, _) = (one.encode_rows(TEXTS) for one in in_float32_and_int8(folder))
    assert reasons == their_reasons == [None] * len(TEXTS)
    assert np.isfinite(found).all()
    assert np.array_equal(found.any(axis=1), exact.any(axis=1))
    if exact.any():
        assert cosines(found, exact)[0].min() > 0.99


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj"])
def test_attention_to_one_token_alone_is_finite(changed, name):
    folder = changed(lambda tensors: tensors[layer(name)].mul_(1e30))
    found, reasons, _ = Encoder.from_pretrained(folder, dtype="int8+float32").encode_rows(TEXTS)
    assert reasons == [None] * len(TEXTS)
    assert np.isfinite(found).all()
    assert found.any(axis=1).all()
