"""LoRA layers in their form for a GPU within a packed Llama: PEFT's outputs, and weights that are in memory once."""

import copy

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

from bivec.engine import lora
from bivec.engine.lora import FusedLoraLinear, fuse_lora_layers
from bivec.engine.model import LlamaModel
from bivec.engine.packing import PackedBatch
from bivec.engine.weights import load_model
from bivec.kernels import chunks, norm, swiglu
from bivec.kernels.lora import stack as lora_stack
from bivec.kernels.norm import kernels as norm_kernels
from bivec.kernels.swiglu import kernels as swiglu_kernels

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXTS = [[5, 9, 70, 33, 12], [8], [21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31]]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The path of a GPU on CPU tensors; returns the room that the calls so far had behind their inputs."""
    rooms = []
    with_room = lora_stack.with_room

    def counted(x, num_columns):
        wide = with_room(x, num_columns)
        rooms.append(wide is not None)
        return wide

    monkeypatch.setattr(lora, "_stacks_on", lambda device: True)
    monkeypatch.setattr(chunks, "SMALL", -1)
    monkeypatch.setattr(norm, "_norm", norm_kernels.norm_forward)
    monkeypatch.setattr(swiglu, "_swiglu", swiglu_kernels.swiglu_forward)
    monkeypatch.setattr(lora_stack, "with_room", counted)
    return rooms


def adapted(folder, **changes) -> LlamaModel:
    """A model whose adapter's B is not zero."""
    model = load_model(LlamaModel, folder, torch.float32)
    add_adapter(model, "default", **changes)
    return model.train()


def add_adapter(model, name, seed=0, **changes) -> None:
    torch.manual_seed(seed)
    arguments = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "init_lora_weights": False} | changes
    inject_adapter_in_model(LoraConfig(**arguments), model, adapter_name=name)


def fused(model) -> LlamaModel:
    model = copy.deepcopy(model)
    fuse_lora_layers(model)
    return model


def outputs_and_gradients(model, **options) -> dict[str, torch.Tensor]:
    hidden_states = model(PackedBatch.from_sequences(TEXTS), **options)
    upstream = torch.randn(hidden_states.shape, generator=torch.Generator().manual_seed(9))
    model.zero_grad()
    hidden_states.backward(upstream)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": hidden_states.detach()} | gradients


def assert_close(expected, got) -> None:
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert (got[name] - tensor).abs().max() <= 2e-4 * tensor.abs().max() + 1e-6, name


@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen3"])
@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"]], ids=["all", "qv"])
def test_outputs_and_gradients_equal_pefts(checkpoint_folders, as_on_a_gpu, name, targets):
    model = adapted(checkpoint_folders[name], target_modules=targets)
    expected = outputs_and_gradients(model)
    assert not as_on_a_gpu
    got = outputs_and_gradients(fused(model))
    assert_close(expected, got)
    # q, k and v, gate and up, and down read what a kernel of ours wrote with room; asked for again in the backward
    layers = len(model.layers)
    assert as_on_a_gpu == [True] * (2 * layers * (3 if targets is ALL else 1))


def test_dropout_is_that_of_the_cpu_with_and_without_checkpointed_activations(checkpoint_folders, monkeypatch, request):
    model = fused(adapted(checkpoint_folders["llama"], lora_dropout=0.3))
    torch.manual_seed(5)
    expected = outputs_and_gradients(model)
    request.getfixturevalue("as_on_a_gpu")
    for checkpointed in (False, True):
        torch.manual_seed(5)
        assert_close(expected, outputs_and_gradients(model, checkpoint_activations=checkpointed))


def test_frozen_adapters_and_steps_of_the_one_in_training(checkpoint_folders, as_on_a_gpu):
    model = adapted(checkpoint_folders["llama"], r=6, target_modules=["q_proj", "down_proj"])
    add_adapter(model, "second", seed=2)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".second." in name)
    ours = fused(model)
    for each in (model, ours):
        trained = [parameter for parameter in each.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-6)
        for _ in range(2):
            results = outputs_and_gradients(each)
            optimizer.step()
        if each is model:
            expected = results
    assert_close(expected, results)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_what_an_optimizer_wrote_is_seen(checkpoint_folders, as_on_a_gpu, options):
    """A fused one does not change a tensor's version."""
    ours = fused(adapted(checkpoint_folders["llama"]))
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.01, **options)
    before = outputs_and_gradients(ours)
    optimizer.step()
    after = outputs_and_gradients(ours)
    assert (after["output"] - before["output"]).abs().max() > 0.01
    assert_close(outputs_and_gradients(copy.deepcopy(ours)), after)  # all is taken over anew there


def test_weights_are_in_memory_once_and_stay_pefts(checkpoint_folders, as_on_a_gpu):
    model = adapted(checkpoint_folders["llama"])
    ours = fused(model)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    expected = outputs_and_gradients(ours)
    layers = [module for module in ours.modules() if isinstance(module, FusedLoraLinear)]
    storages = {layer.base_layer.weight.untyped_storage().data_ptr() for layer in layers}
    assert len(storages) == 4 * len(ours.layers)  # q, k and v; o; gate and up; down
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    adapters = get_peft_model_state_dict(ours)
    assert all(torch.equal(tensor, get_peft_model_state_dict(model)[name]) for name, tensor in adapters.items())

    twin = copy.deepcopy(ours)
    assert_close(expected, outputs_and_gradients(twin))
    twin_layers = [module for module in twin.modules() if isinstance(module, FusedLoraLinear)]
    assert not storages & {layer.base_layer.weight.untyped_storage().data_ptr() for layer in twin_layers}

    for layer in layers:
        layer.merge(safe_merge=layer is layers[0])  # a new weight, or one that is written to
    with torch.no_grad():
        merged = ours(PackedBatch.from_sequences(TEXTS))
    assert (merged - expected["output"]).abs().max() < 1e-3
    for layer in layers:
        layer.unmerge()
    assert_close(expected, outputs_and_gradients(ours))
    ours.bfloat16().float()  # other memory, rounded
    rounded = fused(copy.deepcopy(model).bfloat16().float())
    assert_close(outputs_and_gradients(rounded), outputs_and_gradients(ours))


def test_loaded_adapters_are_seen(checkpoint_folders, as_on_a_gpu):
    model, other = (fused(adapted(checkpoint_folders["llama"], seed=seed)) for seed in (0, 1))
    first, expected = outputs_and_gradients(model), outputs_and_gradients(other)
    assert (first["output"] - expected["output"]).abs().max() > 0.01
    model.load_state_dict(other.state_dict())
    assert_close(expected, outputs_and_gradients(model))
