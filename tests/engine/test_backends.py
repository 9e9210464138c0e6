"""Attention backends: which one is chosen, and that the engine gives the same states through each."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from bivec import Encoder
from bivec.engine.config import load_config
from bivec.engine.layers import LAYERS, CudaLayer
from bivec.engine.model import LlamaModel
from bivec.engine.ops import choose_backend
from bivec.engine.packing import PackedBatch
from bivec.engine.runner import TILES, Runner
from bivec.engine.weights import load_model
from bivec.kernels import reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SEQUENCES = [list(range(5, 40)), [7], list(range(60, 72)), list(range(90, 102))]


@pytest.mark.parametrize(
    ("attention", "device", "dtype", "head_dim", "expected"),
    [
        ("auto", CPU, torch.float32, 64, "sdpa"),
        ("auto", CUDA, torch.bfloat16, 64, "triton"),
        ("auto", CUDA, torch.bfloat16, 8, "sdpa"),
        ("sdpa", CUDA, torch.bfloat16, 64, "sdpa"),
        ("triton", CUDA, torch.float32, 64, "triton"),
    ],
)
def test_choice(attention, device, dtype, head_dim, expected):
    assert choose_backend(attention, device, dtype, head_dim) == expected


@pytest.mark.parametrize(
    ("attention", "device", "dtype", "head_dim", "message"),
    [
        ("triton", CPU, torch.float32, 64, "'triton' needs a CUDA device"),
        ("flash", CPU, torch.bfloat16, 64, "'flash' needs a CUDA device"),
        ("triton", CUDA, torch.bfloat16, 8, "head dimension of 16 to 256, got 8"),
        ("flash", CUDA, torch.float32, 64, "needs bfloat16 or float16"),
        ("flash", CUDA, torch.bfloat16, 64, "needs the flash-attn package"),
        ("eager", CPU, torch.float32, 64, "must be auto or one of triton, flash, sdpa"),
    ],
)
def test_requests_that_cannot_be_met_are_errors(attention, device, dtype, head_dim, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        choose_backend(attention, device, dtype, head_dim)


@pytest.fixture
def flash_attn(monkeypatch):
    """A stand-in with the signature of flash-attn 2.7's varlen function; records how it was called."""
    module = ModuleType("flash_attn")
    calls = []

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k
        assert not causal
        calls.append(window_size)
        return reference.varlen_attention(q, k, v, cu_seqlens_q, max_seqlen_q, window_size=window_size)

    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


def load(folder, device="cpu", dtype=torch.float32):
    return load_model(LlamaModel, folder, dtype).to(device).eval()


@torch.inference_mode()
def states(folder, backend, runner):
    model = load(folder)
    batch = PackedBatch.from_sequences(SEQUENCES)
    return Runner(model, backend)(batch) if runner else model(batch, backend=backend)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("runner", [False, True], ids=["model", "runner"])
def test_flash_gives_the_states_of_sdpa(checkpoint_folders, flash_attn, name, runner):
    folder = checkpoint_folders[name]
    torch.testing.assert_close(states(folder, "flash", runner), states(folder, "sdpa", runner), atol=1e-4, rtol=1e-4)
    assert set(flash_attn) >= set(load_config(folder).bidirectional_windows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for the CUDA device, not interpreted")
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("runner", [False, True], ids=["model", "runner"])
def test_the_interpreted_kernel_gives_the_states_of_sdpa(checkpoint_folders, name, runner):
    folder = checkpoint_folders[name]
    torch.testing.assert_close(states(folder, "triton", runner), states(folder, "sdpa", runner), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for the CUDA device, not interpreted")
@pytest.mark.parametrize("name", ["llama", "llama-bias", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_the_layers_of_cuda_give_the_states_of_the_cpus(checkpoint_folders, monkeypatch, name, backend):
    folder = checkpoint_folders[name]
    expected = states(folder, "sdpa", runner=True)
    monkeypatch.setitem(LAYERS, "cpu", CudaLayer)
    # 60 tokens: in tiles with rows left over, and exactly
    for tiles in ((32,), (20,)):
        monkeypatch.setitem(TILES, "cpu", tiles)
        torch.testing.assert_close(states(folder, backend, runner=True), expected, atol=1e-4, rtol=1e-4)


gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
@needs_cuda
@pytest.mark.parametrize("name", ["llama", "llama-bias", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("attention", ["triton", "sdpa"])
def test_cuda_gives_the_vectors_of_the_cpu(checkpoint_folders, name, attention):
    texts = ["the quick brown fox", "a packed batch holds many sequences side by side " * 4, "北京"]
    expected = Encoder.from_pretrained(checkpoint_folders[name], dtype="float32", device="cpu").encode(texts)
    encoder = Encoder.from_pretrained(checkpoint_folders[name], dtype="float32", device="cuda", attention=attention)
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=1e-3)


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_vectors_are_bitwise_the_same_in_any_company(make_checkpoint, tmp_path, dtype):
    folder = make_checkpoint(
        tmp_path, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3
    )
    encoder = Encoder.from_pretrained(folder, dtype=dtype, device="cuda")
    needle = "the quick brown fox jumps over the lazy dog " * 3
    alone = encoder.encode(needle)
    for count in (1, 7, 100, 1000):
        company = ["brown fox " * (1 + i % 20) for i in range(count)]
        assert np.array_equal(encoder.encode([*company, needle])[-1], alone)


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_captured_pass_gives_the_bits_of_its_launches(checkpoint_folders, dtype):
    runner = Runner(load(checkpoint_folders["llama"], "cuda", dtype), "triton")
    for sequences in (SEQUENCES, [*SEQUENCES, *SEQUENCES, [3] * 300], [[9, 8]], SEQUENCES):
        batch = PackedBatch.from_sequences(sequences, device="cuda")
        windows = runner.config.bidirectional_windows
        assert torch.equal(runner(batch), runner._run(batch, windows))
        assert torch.equal(runner(batch, [(-1, 0)] * len(windows)), runner._run(batch, [(-1, 0)] * len(windows)))
