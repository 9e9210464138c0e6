"""Attention backends: which one is chosen, and that the engine gives the same states through each."""

import sys
import threading
from types import ModuleType

import numpy as np
import pytest
import torch

from bivec import Encoder
from bivec.engine import fastest
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
        ("varlen", CUDA, torch.float16, 96, "varlen"),
    ],
)
def test_choice(attention, device, dtype, head_dim, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_backend(attention, device, dtype, head_dim) == expected


@pytest.mark.parametrize(
    ("attention", "device", "dtype", "head_dim", "message"),
    [
        ("triton", CPU, torch.float32, 64, "'triton' needs a CUDA device"),
        ("flash", CPU, torch.bfloat16, 64, "'flash' needs a CUDA device"),
        ("triton", CUDA, torch.bfloat16, 8, "head dimension of 16 to 256, got 8"),
        ("flash", CUDA, torch.float32, 64, "needs bfloat16 or float16"),
        ("flash", CUDA, torch.bfloat16, 64, "needs the flash-attn package"),
        ("varlen", CPU, torch.bfloat16, 64, "'varlen' needs a CUDA device, got cpu"),
        ("varlen", CUDA, torch.float32, 64, "'varlen' needs bfloat16 or float16, got torch.float32"),
        ("varlen", CUDA, torch.bfloat16, 100, "'varlen' needs a head dimension of 8, 16, 24 ... 256, got 100"),
        ("varlen", CUDA, torch.bfloat16, 64, "'varlen' needs a GPU of capability 8.0 or more, got 7.5"),
        ("eager", CPU, torch.float32, 64, "must be auto or one of triton, varlen, flash, sdpa"),
    ],
)
def test_requests_that_cannot_be_met_are_errors(attention, device, dtype, head_dim, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
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


@pytest.fixture(params=["2.11", "2.13"])
def varlen_attn(monkeypatch, request):
    """A stand-in with the signature that torch's function has in that version; records its windows."""
    calls = []

    def compute(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size):
        assert cu_seq_q is cu_seq_k
        assert max_q == max_k
        assert torch.backends.cuda.flash_sdp_enabled()  # and, from torch 2.15 on, nothing that depends on the batch
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        calls.append(window_size)
        return reference.varlen_attention(query, key, value, cu_seq_q, max_q, window_size=window_size)

    def varlen_attn_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        return compute(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size)

    def varlen_attn_2_13(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
        seqused_k=None,
        block_table=None,
        num_splits=None,
    ):
        assert enable_gqa or query.shape[1] == key.shape[1]
        assert num_splits is None  # FlashAttention 3 alone takes it
        return compute(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size)

    stand_in = {"2.11": varlen_attn_2_11, "2.13": varlen_attn_2_13}[request.param]
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
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


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("runner", [False, True], ids=["model", "runner"])
def test_torchs_varlen_gives_the_states_of_sdpa(checkpoint_folders, varlen_attn, name, runner):
    folder = checkpoint_folders[name]
    torch.testing.assert_close(states(folder, "varlen", runner), states(folder, "sdpa", runner), atol=1e-4, rtol=1e-4)
    assert set(varlen_attn) >= set(load_config(folder).bidirectional_windows)


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for the CUDA device, not interpreted")
@pytest.mark.parametrize("runner", [False, True], ids=["model", "runner"])
def test_all_layers_share_one_list_of_tiles(checkpoint_folders, monkeypatch, runner):
    from bivec.kernels.attention import tile_list

    lists, make = [], tile_list.make_tile_list
    monkeypatch.setattr(tile_list, "make_tile_list", lambda *arguments: lists.append(1) or make(*arguments))
    states(checkpoint_folders["llama"], "triton", runner)
    assert lists == [1]


gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
@needs_cuda
@pytest.mark.parametrize("name", ["llama", "llama-bias", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("attention", ["triton", "sdpa"])  # varlen has no float32
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


@gpu
@needs_cuda
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@torch.inference_mode()
def test_torchs_varlen_gives_the_states_of_ours(checkpoint_folders, name):
    batch = PackedBatch.from_sequences(SEQUENCES, device="cuda")
    model = load(checkpoint_folders[name], "cuda", torch.bfloat16)
    ours, theirs = (Runner(model, backend)(batch).float() for backend in ("triton", "varlen"))
    torch.testing.assert_close(theirs, ours, atol=0.1, rtol=0.1)
    assert fastest.differs_in_company("varlen", model.config, CUDA, torch.bfloat16) == ""


@gpu
@needs_cuda
def test_torchs_varlen_has_gradients(checkpoint_folders):
    batch = PackedBatch.from_sequences(SEQUENCES, device="cuda")
    gradients = []
    for backend in ("triton", "varlen"):
        model = load(checkpoint_folders["llama"], "cuda", torch.bfloat16)
        model(batch, backend=backend).square().sum().backward()
        gradients.append(model.layers[0].self_attn.k_proj.weight.grad.float())
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert error < 0.05


@gpu
@needs_cuda
@torch.inference_mode()
def test_threads_with_streams_of_their_own_share_captured_passes(checkpoint_folders):
    runner = Runner(load(checkpoint_folders["llama"], "cuda", torch.bfloat16), "triton")
    wrong = []

    def run(number):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            batch = PackedBatch.from_sequences([[number + 5] * 250, [number + 9] * 3], device="cuda")
            expected = runner._run(batch, runner.windows)
            for _ in range(200):
                if not torch.equal(runner(batch), expected):
                    wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@gpu
@needs_cuda
@torch.inference_mode()
def test_a_capture_that_cuda_refuses_leaves_a_usable_runner(checkpoint_folders, monkeypatch):
    runner = Runner(load(checkpoint_folders["llama"], "cuda", torch.bfloat16), "triton")
    batch = PackedBatch.from_sequences(SEQUENCES, device="cuda")
    expected = runner._run(batch, runner.windows)
    run, before = runner._captured._run, torch.cuda.current_stream()

    def unfit(*arguments):
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return run(*arguments)

    runner._captured._run = unfit
    assert torch.equal(runner(batch), expected)
    assert list(runner._captured._passes.values()) == [None]
    assert torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
    runner._captured._run = run
    runner.forget_graphs()
    assert torch.equal(runner(batch), expected)
    assert None not in runner._captured._passes.values()


@gpu
@needs_cuda
@torch.inference_mode()
def test_forgotten_graphs_give_back_their_memory(checkpoint_folders):
    runner = Runner(load(checkpoint_folders["llama"], "cuda", torch.bfloat16), "triton")
    batch = PackedBatch.from_sequences([[5] * 250] * 30, device="cuda")
    expected = runner(batch).clone()
    held = torch.cuda.memory_reserved()
    runner.forget_graphs()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held
    assert torch.equal(runner(batch), expected)
