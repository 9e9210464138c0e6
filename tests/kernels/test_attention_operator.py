"""varlen_attention as a torch operator and as a transformers attention: rules, compilation, refusals, models."""

import subprocess
import sys

import pytest
import torch

from bivec.kernels import reference
from bivec.kernels.attention import list_tiles, varlen_attention
from bivec.kernels.attention.operator import attention_forward
from bivec.kernels.attention.tile_list import make_tile_list
from bivec.kernels.attention.transformers import padding_mask, register_with_transformers


def example(device, requires_grad=True):
    inputs = [torch.randn(24, heads, 16, device=device, requires_grad=requires_grad) for heads in (2, 1, 1)]
    return inputs, torch.tensor([0, 3, 20], dtype=torch.int32, device=device)


def test_opcheck(device):
    inputs, cu_seqlens = example(device)
    seeds = torch.tensor([1, 2], device=device)
    chance = torch.tensor(0.5, device=device)
    for random in [(0.0, 1.0, None, None), (0.3, 1.0, chance, seeds)]:
        torch.library.opcheck(
            attention_forward, (*inputs, cu_seqlens, list_tiles(cu_seqlens, 24), -1, 0, 0.25, *random)
        )
    torch.library.opcheck(make_tile_list, (cu_seqlens, 24))


def test_no_graph_break_when_compiled(device):
    """`fullgraph` fails at a break; the compiled gradient is the eager one bit by bit."""
    inputs, cu_seqlens = example(device)

    def step(q, k, v):
        return (varlen_attention(q * 2, k, v, cu_seqlens, 20, window_size=(-1, 3)) + 1).square().mean()

    # the operator is opaque to the code generator, so its graph is what matters
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")
    expected = torch.autograd.grad(step(*inputs), inputs)
    for ours, theirs in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_graph_capture_and_no_synchronisation():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    q, k, v = (
        torch.randn(2048, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2)
    )
    upstream = torch.randn(2048, 8, 64, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 30, 900, 900, 900], dtype=torch.int32, device="cuda")

    def step() -> list[torch.Tensor]:
        output = varlen_attention(q, k, v, cu_seqlens, 2048)
        return [output, *torch.autograd.grad(output, (q, k, v), upstream)]

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for bounds in ([0, 30, 900, 900, 900], [0, 1, 2, 1500, 2048], [0, 0, 0, 0, 0]):
        cu_seqlens.copy_(torch.tensor(bounds, dtype=torch.int32))
        graph.replay()
        for ours, theirs in zip(captured, step(), strict=True):
            assert torch.equal(ours, theirs)


def changed(name, value):
    """Arguments of a sound call with one of them replaced by what `value` makes of it."""
    (q, k, v), cu_seqlens = example("cpu", requires_grad=False)
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens, "max_seqlen": 17, "seeds": torch.zeros(2).long()}
    arguments[name] = value(arguments.get(name))
    return arguments


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", lambda q: q.double(), "q must be bfloat16, float16 or float32, got float64"),
        ("q", lambda q: q[0], r"q must be \(num_tokens, num_heads, head_dim\), got float32 \(2, 16\)"),
        ("q", lambda q: q[..., :8], "q must have a head dimension of 16 to 256, got 8"),
        ("q", lambda q: q.mT.contiguous().mT, "q must be contiguous in its last dimension, got strides"),
        ("k", lambda k: k[1:], r"k must be \(24, num_kv_heads, 16\), got float32 \(23, 1, 16\)"),
        ("k", lambda k: k.half(), "k must have q's dtype torch.float32, got float16"),
        ("k", lambda k: k.repeat(1, 3, 1), "k must have a number of heads that divides q's 2, got 3"),
        ("v", lambda v: v.repeat(1, 2, 1), r"v must have k's shape \(24, 1, 16\), got float32 \(24, 2, 16\)"),
        ("v", lambda v: v.to("meta"), "v must be on q's device cpu, got meta"),
        (
            "cu_seqlens",
            lambda c: c.long(),
            r"cu_seqlens must be int32 of shape \(num_sequences \+ 1,\), got int64 \(3,\)",
        ),
        ("cu_seqlens", lambda c: c[None], r"cu_seqlens must be int32 of shape \(num_sequences \+ 1,\)"),
        ("max_seqlen", lambda m: 2.5, "max_seqlen must be a number of tokens, got 2.5"),
        (
            "window_size",
            lambda _: (-2, 0),
            r"window_size must hold two bounds of at least 0, or -1 for none, got \(-2, 0\)",
        ),
        ("window_size", lambda _: 3, r"window_size must be \(left, right\), got 3"),
        ("softmax_scale", lambda _: float("nan"), "softmax_scale must be finite, got nan"),
        ("dropout_p", lambda _: 1.0, r"dropout_p must be in \[0, 1\), got 1.0"),
        ("dropout_p", lambda _: -0.1, r"dropout_p must be in \[0, 1\), got -0.1"),
        ("future_p", lambda _: 1.5, r"future_p must be in \[0, 1\], got 1.5"),
        ("future_p", lambda _: torch.zeros(2), "future_p must be a number or one float32 element on cpu"),
        (
            "tile_list",
            lambda _: torch.zeros(3, 4),
            r"tile_list must be what list_tiles gives, int32 \(N, 4\), got float32",
        ),
        ("tile_list", lambda _: torch.zeros(3, 4).int().to("meta"), "tile_list must be on q's device cpu, got meta"),
        ("seeds", lambda s: s.int(), r"seeds must be int64 of shape \(2,\), got int32 \(2,\)"),
        ("seeds", lambda s: s[:1], r"seeds must be int64 of shape \(2,\), got int64 \(1,\)"),
    ],
)
def test_refusals_name_the_argument_the_requirement_and_what_came(name, value, message):
    with pytest.raises(ValueError, match=message):
        varlen_attention(**changed(name, value))


@pytest.mark.parametrize("random", [{"dropout_p": 0.1}, {"future_p": 0.5}, {"future_p": torch.tensor(0.5)}])
def test_random_masks_need_seeds(random):
    with pytest.raises(ValueError, match="seeds must be given with dropout_p above 0 or future_p below 1, got None"):
        varlen_attention(**{**changed("seeds", lambda _: None), **random})


def test_a_cpu_without_the_interpreter_is_told_what_else_there_is():
    program = (
        "import torch; from bivec.kernels.attention import varlen_attention as attend; x = torch.zeros(3, 1, 16); "
        "attend(x, x, x, torch.tensor([0, 3], dtype=torch.int32), 3)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    for alternative in ("CUDA", "bivec.kernels.reference", "scaled_dot_product_attention", "TRITON_INTERPRET=1"):
        assert alternative in result.stderr


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}


def model(family, **settings):
    transformers = pytest.importorskip("transformers")
    register_with_transformers()
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **settings}, pad_token_id=0)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}Model")(config).eval()


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Llama", {"num_key_value_heads": 2}),
        ("Llama", {"num_key_value_heads": 1, "is_causal": False}),
        ("Mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
        ("Bert", {}),
        ("ModernBert", {"local_attention": 8, "global_attn_every_n_layers": 2, "reference_compile": False}),
    ],
    ids=["causal", "bidirectional", "sliding", "bert", "modernbert"],
)
def test_transformers_models_agree_with_eager(device, family, settings, side):
    encoder = model(family, **settings).to(device)
    tokens = torch.randint(1, 99, (3, 20), device=device)
    real = torch.ones(3, 20, dtype=torch.long, device=device)
    if side != "none":
        for row, length in enumerate([20, 13, 1]):
            padding = slice(length, None) if side == "right" else slice(0, 20 - length)
            real[row, padding] = 0
    outputs = {}
    for implementation in ("eager", "bivec"):
        encoder.set_attn_implementation(implementation)
        outputs[implementation] = encoder(tokens, attention_mask=real).last_hidden_state[real.bool()]
    torch.testing.assert_close(outputs["bivec"], outputs["eager"], rtol=1e-4, atol=1e-4)


def test_transformers_training_and_generation(device):
    """Gradients reach the weights with dropout on, and a step with a cache sees what the whole row sees."""
    decoder = model("Llama", num_key_value_heads=2, attention_dropout=0.1).to(device)
    decoder.set_attn_implementation("bivec")
    tokens = torch.randint(1, 99, (2, 9), device=device)
    decoder.train()(tokens).last_hidden_state.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in decoder.parameters())
    decoder.eval()
    whole = decoder(tokens).last_hidden_state
    start = decoder(tokens[:, :6], use_cache=True)
    rest = decoder(tokens[:, 6:], past_key_values=start.past_key_values, use_cache=True).last_hidden_state
    torch.testing.assert_close(rest, whole[:, 6:], rtol=1e-4, atol=1e-4)


def test_transformers_masks_that_cannot_be_said_are_refused():
    decoder = model("Llama", num_key_value_heads=2)
    decoder.set_attn_implementation("bivec")
    tokens = torch.randint(1, 99, (1, 8))
    with pytest.raises(ValueError, match="attention_mask must be padding with a causal, bidirectional or sliding"):
        decoder(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), use_cache=False)
    with pytest.raises(ValueError, match=r"attention_mask must be \(1, 8\) padding, got \(1, 1, 8, 8\)"):
        decoder(tokens, attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))


@pytest.mark.parametrize(
    ("visible", "is_window"),
    [
        (lambda row, head, query, key: key <= query, True),
        (lambda row, head, query, key: (key - query).abs() < 3, True),
        (lambda row, head, query, key: query >= 0, True),  # everything, and of the query's shape alone
        (lambda row, head, query, key: key // 3 == query // 3, False),  # blocks
        (lambda row, head, query, key: (key <= query) | (key < 2), False),  # a prefix
        (lambda row, head, query, key: key <= query + row, False),  # another one for each row
    ],
)
def test_a_mask_is_known_by_what_it_shows_not_by_its_name(visible, is_window):
    if is_window:
        assert padding_mask(2, 6, 6, mask_function=visible) is None
    else:
        with pytest.raises(ValueError, match="attention_mask must be padding"):
            padding_mask(2, 6, 6, mask_function=visible)


def test_reference_and_operator_share_their_signature():
    import inspect

    assert inspect.signature(varlen_attention) == inspect.signature(reference.varlen_attention)
