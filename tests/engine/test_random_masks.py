"""Attention dropout and annealed masks in the packed Llama: the same masks with each backend, in training and again
when activations are recomputed."""

import peft
import pytest
import torch

from bivec.engine.lora import fuse_lora_layers
from bivec.engine.model import LlamaModel
from bivec.engine.ops import attention
from bivec.engine.packing import PackedBatch
from bivec.engine.weights import load_model

TEXTS = [list(range(5, 40)), [7], list(range(60, 72)), list(range(90, 102))]
SEEDS = torch.tensor([2**62 + 11, -5, 2**40 + 1, -(2**63)])
RANDOM = {"dropout_p": 0.3, "future_p": 0.5}


def load(folder) -> LlamaModel:
    return load_model(LlamaModel, folder, torch.float32).requires_grad_(True)


def add_lora(model, dropout) -> LlamaModel:
    torch.manual_seed(0)
    model.requires_grad_(False)
    config = peft.LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    fuse_lora_layers(model)
    return model.train()


def states_and_gradients(model, batch, **options) -> dict[str, torch.Tensor]:
    hidden_states = model(batch, **options)
    model.zero_grad()
    hidden_states.backward(torch.randn(hidden_states.shape, generator=torch.Generator().manual_seed(9)))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"hidden_states": hidden_states.detach()} | gradients


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for the CUDA device, not interpreted")
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_interpreted_kernel_draws_the_masks_of_sdpa(checkpoint_folders, name):
    model, batch = load(checkpoint_folders[name]), PackedBatch.from_sequences(TEXTS)
    triton = states_and_gradients(model, batch, backend="triton", seeds=SEEDS, **RANDOM)
    sdpa = states_and_gradients(model, batch, backend="sdpa", seeds=SEEDS, **RANDOM)
    for key, tensor in sdpa.items():
        assert (triton[key] - tensor).abs().max() <= 1e-4 * tensor.abs().max() + 1e-6, key
    for other in ({"seeds": SEEDS.roll(1)} | RANDOM, {"seeds": SEEDS, "dropout_p": 0.3}, {}):
        assert not torch.allclose(model(batch, **other), sdpa["hidden_states"], atol=1e-2)


@pytest.mark.parametrize("random", [{"dropout_p": 0.3}, {"future_p": 0.5}], ids=str)
def test_a_seed_alone_decides_on_a_texts_masks(tiny_llama_folder, random):
    model = load(tiny_llama_folder)
    batch = PackedBatch.from_sequences([TEXTS[0], TEXTS[2], TEXTS[0], TEXTS[0]])
    first, _, second, third = model(batch, seeds=torch.tensor([3, 4, 5, 3]), **random).split(batch.seqlens)
    alone = model(PackedBatch.from_sequences([TEXTS[0]]), seeds=torch.tensor([3]), **random)
    torch.testing.assert_close(third, first, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone, first, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(second, first, atol=1e-2)


def test_layers_have_masks_of_their_own(make_checkpoint, tmp_path):
    """With zero queries and keys every visible token counts alike, so a layer's output shows its mask."""
    model = load(make_checkpoint(tmp_path, num_hidden_layers=2))
    for layer in model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    seen = []
    for layer in model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        layer.self_attn.v_proj.register_forward_hook(lambda _, __, output: torch.eye(*output.shape))
    batch = PackedBatch.from_sequences([list(range(5, 17))])
    model(batch, dropout_p=0.5, seeds=torch.tensor([9]))
    first, second = (states[:, :12] > 0 for states in seen)
    assert not torch.equal(first, second)
    step = torch.tensor([9]) + (0x9E3779B97F4A7C15 - 2**64)
    model(batch, dropout_p=0.5, seeds=step)
    assert torch.equal(seen[2][:, :12] > 0, second)


def test_no_chance_is_bitwise_no_mask(tiny_llama_folder):
    model, batch = load(tiny_llama_folder), PackedBatch.from_sequences(TEXTS)
    assert torch.equal(model(batch, seeds=SEEDS), model(batch))


@pytest.mark.parametrize("random", [{}, {"seeds": SEEDS} | RANDOM], ids=["plain", "random"])
def test_recomputed_activations_give_bitwise_the_same_gradients(tiny_llama_folder, random):
    model, batch = add_lora(load(tiny_llama_folder), dropout=0.2), PackedBatch.from_sequences(TEXTS)
    results = []
    for checkpoint_activations in (False, True):
        torch.manual_seed(4)
        results.append(states_and_gradients(model, batch, checkpoint_activations=checkpoint_activations, **random))
        results[-1]["generator"] = torch.get_rng_state()
    kept, recomputed = results
    assert kept.keys() == recomputed.keys()
    for name, tensor in kept.items():
        assert torch.equal(recomputed[name], tensor), name
    torch.manual_seed(5)
    assert not torch.equal(model(batch, **random), kept["hidden_states"])  # the dropout is there


def test_recomputing_keeps_only_the_layers_inputs(tiny_llama_folder):
    model, batch = load(tiny_llama_folder), PackedBatch.from_sequences(TEXTS)
    kept = []
    for checkpoint_activations in (False, True):
        sizes = {}
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def record(tensor, sizes=sizes, parameters=parameters):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            output = model(batch, seeds=SEEDS, checkpoint_activations=checkpoint_activations, **RANDOM)
        assert output.requires_grad
        kept.append(sum(sizes.values()))
    assert kept[1] < kept[0] / 4


@pytest.mark.parametrize(
    ("random", "message"),
    [({"dropout_p": 0.1}, "dropout_p must be 0, got 0.1"), ({"future_p": 0.5}, "future_p must be 1, got 0.5")],
)
@pytest.mark.parametrize("backend", ["varlen", "flash"])
def test_flash_attention_refuses_random_masks(random, message, backend):
    batch = PackedBatch.from_sequences(TEXTS)
    heads = torch.zeros(batch.num_tokens, 2, 16)
    with pytest.raises(ValueError, match=message):
        attention(heads, heads, heads, batch, (-1, -1), backend, seeds=SEEDS, **random)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_random_masks_need_seeds(backend):
    batch = PackedBatch.from_sequences(TEXTS)
    heads = torch.zeros(batch.num_tokens, 2, 16)
    with pytest.raises(ValueError, match="seeds must be given with dropout_p above 0 or future_p below 1"):
        attention(heads, heads, heads, batch, (-1, -1), backend, dropout_p=0.1)


@pytest.mark.parametrize("random", [{}, {"seeds": SEEDS} | RANDOM], ids=["plain", "random"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_training_and_inference_agree(checkpoint_folders, name, random):
    """Without random masks the one runs the padded attention and the other SDPA over equal lengths."""
    model, batch = load(checkpoint_folders[name]), PackedBatch.from_sequences(TEXTS)
    with torch.no_grad():
        expected = model(batch, **random)
    torch.testing.assert_close(model(batch, **random).detach(), expected, rtol=1e-4, atol=1e-4)
