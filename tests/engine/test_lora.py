"""Fused LoRA layers of a packed Llama against PEFT's own forward, and their adapters in plain PEFT."""

import copy

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file

from bivec.engine.encoder import Encoder
from bivec.engine.lora import FusedLoraLinear, fuse_lora_layers
from bivec.engine.model import LlamaModel
from bivec.engine.packing import PackedBatch
from bivec.engine.weights import load_model
from bivec.kernels import lora as kernel

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXTS = [[5, 9, 70, 33, 12], [8], [21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31]]


def add_adapter(model, name="default", seed=0, **changes) -> None:
    """A fresh adapter whose B is not zero."""
    torch.manual_seed(seed)
    arguments = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "init_lora_weights": False} | changes
    inject_adapter_in_model(LoraConfig(**arguments), model, adapter_name=name)


def pair(folder, **changes) -> tuple[LlamaModel, LlamaModel]:
    """The same model with PEFT's layers and with fused ones, both in training mode."""
    model = load_model(LlamaModel, folder, torch.float32)
    add_adapter(model, **changes)
    fused = copy.deepcopy(model)
    fuse_lora_layers(fused)
    return model.train(), fused.train()


def outputs_and_gradients(model) -> dict[str, torch.Tensor]:
    batch = PackedBatch.from_sequences(TEXTS)
    hidden_states = model(batch)
    upstream = torch.randn(hidden_states.shape, generator=torch.Generator().manual_seed(9))
    model.zero_grad()
    hidden_states.backward(upstream)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": hidden_states.detach()} | gradients


def assert_equal(model, fused) -> None:
    expected, got = outputs_and_gradients(model), outputs_and_gradients(fused)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert (got[name] - tensor).abs().max() <= 2e-4 * tensor.abs().max() + 1e-6, name


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many linears each call of the kernel had."""
    seen = []

    def counted(x, linears, **options):
        seen.append(len(linears))
        return kernel.lora_linears(x, linears, **options)

    monkeypatch.setattr("bivec.engine.lora.lora_linears", counted)
    return seen


@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen3"])
@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], ["v_proj", "down_proj"]], ids=["all", "qv", "vd"])
def test_outputs_and_gradients_equal_pefts(checkpoint_folders, calls, name, targets):
    model, fused = pair(checkpoint_folders[name], target_modules=targets)
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert_equal(model, fused)
    expected = {"q_proj": [3, 1, 2, 1], "v_proj": [3, 1] if "down_proj" in targets else [3]}
    assert calls == 3 * expected["q_proj" if targets is ALL else "v_proj"]


def test_frozen_adapters_beneath_a_fresh_one(checkpoint_folders, calls):
    model = load_model(LlamaModel, checkpoint_folders["llama"], torch.float32)
    add_adapter(model, "first", seed=1, r=6, target_modules=["q_proj", "down_proj"])
    add_adapter(model, "second", seed=2)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_adapter(["first", "second"])
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(".second." in parameter_name)
    fused = copy.deepcopy(model)
    fuse_lora_layers(fused)
    assert_equal(model, fused)
    assert calls == 3 * [3, 1, 2, 1]
    assert not any(".first." in name for name in outputs_and_gradients(fused) if name != "output")
    before = outputs_and_gradients(fused)["output"]
    for module in fused.modules():
        if isinstance(module, FusedLoraLinear):
            module.set_adapter("second")
    assert (outputs_and_gradients(fused)["output"] - before).abs().max() > 0.1  # the first one was there


@pytest.mark.parametrize("case", ["dora", "two that train", "lora_bias", "base that trains", "autocast"])
def test_what_the_kernel_does_not_cover_is_pefts(checkpoint_folders, calls, case):
    settings = {"dora": {"use_dora": True}, "lora_bias": {"lora_bias": True}}.get(case, {})
    model, fused = pair(checkpoint_folders["llama-bias"], **settings)
    for each in (model, fused):
        if case == "two that train":
            add_adapter(each, "other", seed=3)
            for module in each.modules():
                if isinstance(module, peft.tuners.lora.LoraLayer):
                    module.set_adapter(["default", "other"])
        elif case == "base that trains":
            each.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
        expected, got = outputs_and_gradients(model), outputs_and_gradients(fused)
    assert calls == []
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_disabled_and_merged_adapters(checkpoint_folders, calls):
    _, fused = pair(checkpoint_folders["llama"])
    batch = PackedBatch.from_sequences(TEXTS)
    with torch.no_grad():
        base = load_model(LlamaModel, checkpoint_folders["llama"], torch.float32)(batch)
        adapted = fused(batch)
        calls.clear()
        for module in fused.modules():
            if isinstance(module, FusedLoraLinear):
                module.enable_adapters(False)
        assert torch.equal(fused(batch), base)
        for module in fused.modules():
            if isinstance(module, FusedLoraLinear):
                module.enable_adapters(True)
                module.merge()
        torch.testing.assert_close(fused(batch), adapted, rtol=1e-3, atol=1e-3)
    assert calls == []


def test_dropout_is_on_in_training_only_and_repeats_with_torchs_seed(checkpoint_folders, calls):
    model, fused = pair(checkpoint_folders["llama"], lora_dropout=0.2)
    torch.manual_seed(5)
    first = outputs_and_gradients(fused)
    torch.manual_seed(5)
    again = outputs_and_gradients(fused)
    assert calls == 6 * [3, 1, 2, 1]
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor), name
    other = outputs_and_gradients(fused)["output"]
    assert (other - first["output"]).abs().max() > 0.01
    assert_equal(model.eval(), fused.eval())


def test_an_adapter_trained_here_loads_in_plain_peft(checkpoint_folders, tmp_path):
    folder = checkpoint_folders["llama"]
    _, fused = pair(folder, init_lora_weights=True, lora_dropout=0.1)
    trained = [parameter for parameter in fused.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    for _ in range(2):  # the first step moves the zero B's, the second one the A's
        outputs_and_gradients(fused)
        optimizer.step()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=ALL, base_model_name_or_path=str(folder))
    config.save_pretrained(tmp_path)
    tensors = get_peft_model_state_dict(fused)
    assert len(tensors) == 3 * 7 * 2
    save_file(
        {f"base_model.model.{key}": t.contiguous() for key, t in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )

    base = transformers.AutoModel.from_pretrained(folder).eval()
    base.config.is_causal = False
    with torch.no_grad():
        bare = torch.cat([base(torch.tensor([ids])).last_hidden_state[0] for ids in TEXTS])
        plain = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        expected = torch.cat([plain(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in TEXTS])
        fused.eval()
        got = fused.norm(fused(PackedBatch.from_sequences(TEXTS)))
    assert (got - expected).abs().max() < 1e-3
    assert (bare - expected).abs().max() > 0.1
    loaded = get_peft_model_state_dict(plain)
    assert all(torch.equal(loaded[f"base_model.model.{key}"], tensor) for key, tensor in tensors.items())
    # and in the encoder, merged
    encoder = Encoder.from_pretrained(str(folder), adapters=[str(tmp_path)], device="cpu", dtype="float32")
    states = encoder.model.norm(encoder.model(PackedBatch.from_sequences(TEXTS)))
    assert (states - expected).abs().max() < 1e-3


def test_fusing_twice_changes_nothing_and_a_model_without_adapters_is_refused(checkpoint_folders):
    model, fused = pair(checkpoint_folders["llama"])
    assert fuse_lora_layers(fused) == fuse_lora_layers(model) == 21
    with pytest.raises(ValueError, match="model must have LoRA linears of PEFT, LlamaModel has none"):
        fuse_lora_layers(load_model(LlamaModel, checkpoint_folders["llama"], torch.float32))
