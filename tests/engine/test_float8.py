"""float8: a pass is that of the specification, a row depends on itself alone, and no float weights are kept.

Without a GPU the kernels are interpreted, and torch's product is replaced by one in float64, whose sums are exact.
"""

from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bivec.benchmarks.fake_cuda import FakeCuda
from bivec.engine import encoder as encoder_module
from bivec.engine import ops, runner
from bivec.engine.config import load_config
from bivec.engine.encoder import Encoder
from bivec.engine.float8 import Float8Linear
from bivec.engine.model import LlamaModel
from bivec.engine.packing import PackedBatch
from bivec.engine.runner import Runner
from bivec.engine.weights import load_model
from bivec.kernels import reference
from bivec.kernels.float8 import quantize_rows

SEQUENCES = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [42], [*range(50, 80)], [300, 2, 17, 5], [21] * 5]


def scaled_mm(a, b, *, scale_a, scale_b, bias, out_dtype, use_fast_accum, out):
    assert not use_fast_accum
    product = (a.double() @ b.double()) * scale_a * scale_b
    product = (product if bias is None else product + bias).to(out_dtype)
    return product if out is None else out.copy_(product)


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> str:
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("kernels are interpreted where there is no CUDA device, and only there")
    if request.param == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs a GPU of capability 8.9")
    if request.param == "cpu":
        monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
        monkeypatch.setattr(ops, "attends_in_batches", lambda *_: False)  # it is for the CPU's own form of heads
        monkeypatch.setitem(runner.TILES, "cpu", (16, 32))
    return request.param


def load(folder, device) -> LlamaModel:
    return load_model(LlamaModel, folder, torch.bfloat16).to(device).eval()


def make_runner(folder, device) -> Runner:
    return Runner(load(folder, device), "triton" if device == "cuda" else "sdpa", products="float8")


def dequantized(rows) -> torch.Tensor:
    values, scales = rows
    return values.double() * scales.double()


def states(model: LlamaModel, batch: PackedBatch, quantize, rounded) -> torch.Tensor:
    """Last hidden states in float64.

    Args:
        model: in float64.
        quantize: what is made of rows and of weights that are multiplied.
        rounded: what is made of all that a pass writes between products.
    """
    config = model.config

    def product(rows, *linears):
        return [rounded(F.linear(quantize(rows), quantize(linear.weight), linear.bias)) for linear in linears]

    hidden = model.embed_tokens(batch.input_ids)
    tables = [table.double() for table in model.rotary_tables(batch.positions)]
    for layer, window in zip(model.layers, config.bidirectional_windows, strict=True):
        attention, mlp, eps = layer.self_attn, layer.mlp, config.rms_norm_eps
        normed = reference.rms_norm(hidden, layer.input_layernorm.weight, eps)
        query, key, value = (
            part.unflatten(1, (-1, config.head_dim))
            for part in product(normed, attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            query = rounded(reference.rms_norm(query, attention.q_norm.weight, eps))
            key = rounded(reference.rms_norm(key, attention.k_norm.weight, eps))
        query, key = map(rounded, reference.apply_rotary(query, key, *tables))
        lengths = batch.cu_seqlens, batch.max_seqlen
        attended = rounded(reference.varlen_attention(query, key, value, *lengths, window_size=window))
        hidden = rounded(hidden + product(attended.flatten(1), attention.o_proj)[0])
        normed = reference.rms_norm(hidden, layer.post_attention_layernorm.weight, eps)
        gated = reference.swiglu(*product(normed, mlp.gate_proj, mlp.up_proj))
        hidden = rounded(hidden + product(gated, mlp.down_proj)[0])
    return hidden


@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen2", "qwen3"])
@torch.inference_mode()
def test_a_pass_is_that_of_the_specification(device, make_checkpoint, tmp_path, name):
    """Far nearer to float64 with the same roundings than that is to float64 without them."""
    folder = make_checkpoint(tmp_path, name, num_hidden_layers=1)
    batch = PackedBatch.from_sequences(SEQUENCES, device=device)
    found = make_runner(folder, device)(batch)
    assert found.dtype == torch.bfloat16
    model = load(folder, device).double()
    quantized = states(
        model, batch, lambda rows: dequantized(reference.quantize_rows(rows)), lambda rows: rows.bfloat16().double()
    )
    exact = states(model, batch, lambda rows: rows, lambda rows: rows)
    error, cost = ((a - b).norm() / exact.norm() for a, b in ((found, quantized), (quantized, exact)))
    assert error < 0.5 * cost


@torch.inference_mode()
def test_a_token_has_the_same_bits_in_any_company(device, checkpoint_folders):
    run = make_runner(checkpoint_folders["qwen3"], device)
    together = run(PackedBatch.from_sequences(SEQUENCES, device=device)).split([len(part) for part in SEQUENCES])
    for sequence, expected in zip(SEQUENCES, together, strict=True):
        assert torch.equal(run(PackedBatch.from_sequences([sequence], device=device)), expected)


@torch.inference_mode()
def test_a_linear_is_the_product_of_what_was_rounded(device):
    generator = torch.Generator().manual_seed(0)
    weight, bias, rows = (torch.randn(shape, generator=generator) for shape in ((48, 64), (48,), (32, 64)))
    weight[5], rows[3] = 0.0, 0.0
    weight, bias, rows = weight.to(device), bias.to(device), rows.to(device, torch.bfloat16)
    linear = Float8Linear("a_proj", weight, bias)
    found = linear(quantize_rows(rows))
    exact = dequantized(quantize_rows(rows)) @ dequantized(quantize_rows(weight)).T + bias.bfloat16()
    assert ((found - exact).abs() <= 2**-8 * exact.abs() + 2**-12).all()
    assert torch.equal(found[3], bias.bfloat16())
    assert torch.equal(found[:, 5], bias.bfloat16()[5].expand(32))
    assert linear.num_bytes == 48 * 64 + 48 * 4
    rows[7, 9] = float("inf")
    wrong = linear(quantize_rows(rows))
    assert wrong[7].isnan().all()
    assert torch.equal(wrong[8:], found[8:])


@torch.inference_mode()
def test_no_float_weights_are_kept(device, checkpoint_folders):
    run = make_runner(checkpoint_folders["llama"], device)
    matrices = sum(parameter.numel() for parameter in load(checkpoint_folders["llama"], "cpu").layers.parameters())
    held = [
        tensor
        for layer in run.layers
        for value in vars(layer).values()
        for tensor in (vars(value).values() if isinstance(value, Float8Linear) else [value])
        if isinstance(tensor, torch.Tensor)
    ]
    assert {tensor.dtype for tensor in held if min(tensor.shape) > 1 and tensor.dim() > 1} == {torch.float8_e4m3fn}
    assert sum(tensor.nbytes for tensor in held) < 1.2 * matrices  # scales and norms are much of so small a model
    assert run.packed_bytes == sum(tensor.nbytes for tensor in held if tensor.dim() > 1)


def test_what_inspect_says(checkpoint_folders):
    with FakeCuda(), mock.patch.object(encoder_module, "check_mask", return_value={}):  # it looks at values
        encoder = Encoder.from_pretrained(checkpoint_folders["llama"], device="cuda", dtype="float8")
        backend, memory = encoder.describe()["backend"], encoder.describe()["memory"]
        assert backend["dtype"].startswith("float8+bfloat16: ")
        assert all(parameter.is_meta for parameter in encoder.model.layers.parameters())
        assert encoder.dtype == torch.bfloat16
        config = load_config(checkpoint_folders["llama"])
        embeddings = (config.vocab_size + 1) * config.hidden_size * 2
        assert memory["weights"] == f"{embeddings / 2**20:,.1f} MiB"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 100}, r"multiples of 16, but the weight of gate_proj and up_proj is \(200, 64\)"),
        ({"hidden_size": 72, "head_dim": 16}, r"the weight of q_proj, k_proj and v_proj is \(128, 72\)"),
    ],
)
def test_sizes_that_cannot_be_multiplied_are_named(make_checkpoint, tmp_path, changes, message):
    folder = make_checkpoint(tmp_path, **changes)
    with FakeCuda(), pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(folder, device="cuda", dtype="float8")


TEXTS = [
    "the quick brown fox",
    "a packed batch holds many sequences side by side " * 4,
    "北京",
    "fox",
    "lazy dog " * 50,
]


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory, make_checkpoint):
    return make_checkpoint(
        tmp_path_factory.mktemp("wide"),
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        initializer_range=0.05,
    )


@pytest.fixture
def on_gpu():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU of capability 8.9")


@pytest.mark.gpu
def test_vectors_are_bitwise_the_same_in_any_company_and_captured(on_gpu, wide_folder):
    encoder = Encoder.from_pretrained(wide_folder, device="cuda", dtype="float8")
    alone = encoder.encode(TEXTS[1])
    for count in (1, 7, 100, 1000):
        company = ["brown fox " * (1 + i % 20) for i in range(count)]
        assert np.array_equal(encoder.encode([*company, TEXTS[1]])[-1], alone)
    with mock.patch.object(encoder.runner, "_captured", None):
        assert np.array_equal(encoder.encode(TEXTS[1]), alone)


@pytest.mark.gpu
def test_vectors_are_near_those_of_bfloat16_in_half_the_memory(on_gpu, wide_folder):
    vectors, memory = {}, {}
    for dtype in ("bfloat16", "float8"):
        before = torch.cuda.memory_allocated()
        encoder = Encoder.from_pretrained(wide_folder, device="cuda", dtype=dtype)
        encoder.runner.forget_graphs()
        memory[dtype] = torch.cuda.memory_allocated() - before
        vectors[dtype] = torch.from_numpy(encoder.encode(TEXTS)).double()
        del encoder
    assert F.cosine_similarity(vectors["float8"], vectors["bfloat16"], dim=1).min() > 0.99
    assert memory["float8"] < 0.6 * memory["bfloat16"]
