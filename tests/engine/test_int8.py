"""Eight-bit products against an int64 reference of the same quantisation, bit by bit."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bivec.engine import dtypes, int8
from bivec.engine.config import load_config
from bivec.engine.encoder import Encoder
from bivec.engine.int8 import Int8Linear, check_products, quantize_rows, silu_
from bivec.engine.layers import Int8Layer
from bivec.engine.model import LlamaModel
from bivec.engine.weights import load_model

TEXTS = ["fox", "", "the quick brown fox", *(" ".join(["jumps over a lazy dog"] * n) for n in (3, 5, 9, 30))]


@pytest.fixture(scope="module", autouse=True)
def _multiplies():
    try:
        check_products()
    except ValueError as error:
        pytest.skip(str(error))


def quantized(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 values and float32 scales of each row, in plain PyTorch."""
    largest = values.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return (values * (127 / largest)).round().long(), largest * (1 / 127)


class Int64Linear:
    """`Int8Linear` in int64."""

    def __init__(self, weight, bias):
        self.weight, self.scales = quantized(weight.float())
        self.bias = None if bias is None else bias.float()
        self.num_bytes = 0

    def __call__(self, rows):
        return ((rows.long() - 128) @ self.weight.T).float() * self.scales.T


def random_rows(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize(("num_rows", "size"), [(1, 1), (5, 7), (16, 576), (67, 130)])
def test_rows_are_rounded_to_the_nearest_of_255_levels(num_rows, size, scale):
    rows = random_rows(num_rows, size, scale=scale)
    found = quantize_rows(rows)
    values, scales = quantized(rows)
    assert found.values.dtype is torch.uint8
    assert torch.equal(found.values.long() - 128, values)
    assert torch.equal(found.scales, scales)
    assert values.abs().amax(-1).eq(127).all()
    error = ((found.values.double() - 128) * found.scales.double() - rows.double()).abs()
    assert (error <= scales * 0.5001).all()


def test_quantising_in_place_gives_the_same():
    rows = random_rows(9, 33)
    expected = quantize_rows(rows)
    scratch = rows.clone()
    assert all(map(torch.equal, quantize_rows(scratch, out=scratch), expected))


def test_halves_are_rounded_to_even():
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert (quantize_rows(row).values.long() - 128).tolist() == [[127, 0, 2, 2, 0, -2, -2]]


SILU_ON_CORES = """
import json, torch
from bivec.engine.int8 import silu_
generator = torch.Generator().manual_seed(0)
found = []
for shape in (16, 33), (64, 1000), (256, 4099), (1024, 1000):
    rows = 4 * torch.randn(shape, generator=generator)
    torch.set_num_threads(1)
    expected = silu_(rows.clone())
    found.append(torch.equal(torch.cat([silu_(part.clone()) for part in rows.split(16)]), expected))
    for cores in (2, 3, 5, 7, 12):
        torch.set_num_threads(cores)
        found.append(torch.equal(silu_(rows.clone()), expected))
print(json.dumps(found))
"""


def test_silu_has_the_same_bits_at_any_place_on_any_number_of_cores(python):
    """torch's own has not; quantising the rows hides that from the checks at load."""
    assert python(SILU_ON_CORES, OMP_WAIT_POLICY="passive") == [True] * 24


@pytest.mark.parametrize("shape", [(1, 1), (3, 11), (16, 64), (40, 1000)])
def test_silu_is_that_of_float64(shape):
    rows = random_rows(*shape, scale=4)
    exact = F.silu(rows.double())
    assert ((silu_(rows).double() - exact).abs() <= 4e-7 * exact.abs()).all()


@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (5, 3), (64, 16), (130, 67), (960, 576), (40, 8200)])
def test_products_are_those_of_int64(out_features, in_features):
    weight = random_rows(out_features, in_features, seed=1)
    linear, exact = Int8Linear(weight, None), Int64Linear(weight, None)
    for num_rows in (1, 16, 64, 65):
        rows = quantize_rows(random_rows(num_rows, in_features, seed=num_rows)).values
        assert torch.equal(linear(rows), exact(rows))
        rows[:] = 255  # the largest sums
        assert torch.equal(linear(rows), exact(rows))


def test_a_zero_row_or_channel_gives_zeros():
    weight = random_rows(6, 10)
    weight[2] = 0
    linear = Int8Linear(weight, None)
    rows = random_rows(4, 10)
    rows[1] = 0
    found = quantize_rows(rows)
    assert found.values[1].eq(128).all()
    products = linear(found.values) * found.scales
    assert products[1].eq(0).all()
    assert products[:, 2].eq(0).all()
    assert products.isfinite().all()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_gives_one_that_is_not_and_spares_the_others(wrong):
    linear, rows = Int8Linear(random_rows(6, 10), None), random_rows(3, 10)
    expected = quantize_rows(rows)
    rows[1, 4] = wrong
    found = quantize_rows(rows)
    products = linear(found.values) * found.scales
    assert not products[1].isfinite().any()
    assert torch.equal(products[[0, 2]], (linear(expected.values) * expected.scales)[[0, 2]])


def layer_and_reference(folder, monkeypatch):
    model = load_model(LlamaModel, folder, torch.float32)
    layer = Int8Layer(model.layers[0])
    monkeypatch.setattr(Int8Layer, "linear", Int64Linear)
    return layer, Int8Layer(model.layers[0])


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_layer_is_that_of_int64_whatever_its_tiles(checkpoint_folders, monkeypatch, name):
    folder = checkpoint_folders[name]
    config = load_config(folder)
    layer, exact = layer_and_reference(folder, monkeypatch)
    num_rows = 48
    hidden = random_rows(num_rows, config.hidden_size)
    attended = random_rows(num_rows, config.num_attention_heads * config.head_dim, seed=2)
    hidden[7] = attended[7] = 0
    angles = torch.complex(*(random_rows(num_rows, config.head_dim // 2, seed=seed) for seed in (3, 4)))

    def run(form, size):
        tiles = [slice(start, start + size) for start in range(0, num_rows, size)]
        found = form.project(hidden, angles, form.new_heads(config, num_rows, hidden), tiles)
        after = hidden.clone()
        form.finish(after, attended, tiles)
        return *found, after

    expected = run(exact, num_rows)
    assert all(part.isfinite().all() for part in expected)
    for size in (16, 48):
        assert all(map(torch.equal, run(layer, size), expected))


def test_a_layer_is_about_that_of_floats(checkpoint_folders):
    """The algebra of scales that go past, against the layer's own differentiable form."""
    for name in ("llama", "qwen2", "qwen3"):
        exact = Encoder.from_pretrained(checkpoint_folders[name], dtype="float32").encode(TEXTS[2:])
        found = Encoder.from_pretrained(checkpoint_folders[name], dtype="int8+float32").encode(TEXTS[2:])
        a, b = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (exact, found))
        assert ((a * b).sum(1) > 0.995).all(), name


@pytest.mark.parametrize("beside", ["float32", "bfloat16"])
def test_vectors_are_the_same_alone_and_in_any_batch(tiny_llama_folder, beside):
    encoder = Encoder.from_pretrained(tiny_llama_folder, dtype=f"int8+{beside}")
    together = encoder.encode(TEXTS * 5)
    for place, text in enumerate(TEXTS):
        assert np.array_equal(encoder.encode(text), together[place])
        assert np.array_equal(together[place], together[place + 2 * len(TEXTS)])


def test_no_float_linear_is_kept(tiny_llama_folder):
    encoder = Encoder.from_pretrained(tiny_llama_folder, dtype="int8")
    kept = {name for name, parameter in encoder.model.named_parameters() if not parameter.is_meta}
    assert kept == {"embed_tokens.weight", "norm.weight"}
    floats = Encoder.from_pretrained(tiny_llama_folder, dtype="float32")
    assert encoder.describe()["model"]["parameters"] == floats.describe()["model"]["parameters"]
    assert 3.5 * encoder.runner.packed_bytes < floats.runner.packed_bytes < 4 * encoder.runner.packed_bytes


def test_what_quantising_hides_of_other_cores_is_noticed(tiny_llama_folder, monkeypatch, cores):
    encoder = Encoder.from_pretrained(tiny_llama_folder, dtype="int8+float32")
    assert encoder.runner.one_core == ""
    project = Int8Layer.project

    def core_dependent(self, hidden, angles, heads, tiles):
        found = project(self, hidden, angles, heads, tiles)
        if torch.get_num_threads() > 1:
            heads[5, 0, 0] *= 1 + 2**-23
        return found

    monkeypatch.setattr(Int8Layer, "project", core_dependent)
    cores(4)
    encoder = Encoder.from_pretrained(tiny_llama_folder, dtype="int8+float32")
    assert encoder.runner.one_core == "a pass has other bits on 4 cores than on one"


@pytest.mark.parametrize("adapted", [False, True])
def test_nothing_that_is_kept_holds_a_whole_file_in_memory(make_checkpoint, make_adapter, tmp_path, adapted):
    """A memory-mapped tensor does, and one in the wanted dtype is memory-mapped."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux says which files are mapped")
    folder = make_checkpoint(tmp_path, "llama-bias")
    if adapted:
        make_adapter(folder, tmp_path / "adapter")
    encoder = Encoder.from_pretrained(folder, adapters=[tmp_path / "adapter"] * adapted, dtype="int8+float32")
    gc.collect()
    # without adapters that of the embeddings, of which nothing else is read
    assert maps.read_text().count(str(folder / "model.safetensors")) == (0 if adapted else 1)
    assert encoder.encode("fox").any()


def test_adapters_are_merged_before_weights_are_quantised(tiny_llama_folder, make_adapter, tmp_path):
    make_adapter(tiny_llama_folder, tmp_path / "adapter")
    exact, found, without = (
        Encoder.from_pretrained(tiny_llama_folder, adapters=adapters, dtype=dtype).encode(TEXTS[-1])
        for adapters, dtype in (([tmp_path / "adapter"], "float32"), ([tmp_path / "adapter"], "int8"), ([], "float32"))
    )
    assert np.linalg.norm(found - exact) < 0.3 * np.linalg.norm(without - exact)


def test_products_that_are_not_exact_are_refused(tiny_llama_folder, monkeypatch):
    exact = Int8Linear.__call__
    monkeypatch.setattr(Int8Linear, "__call__", lambda self, rows: exact(self, rows) + 1)
    with pytest.raises(ValueError, match=r"dtype int8 cannot be used here: .* not exact"):
        Encoder.from_pretrained(tiny_llama_folder, dtype="int8")


def test_a_slow_reference_is_refused(monkeypatch):
    seconds = iter([1.0, 0.01])
    monkeypatch.setattr(int8, "_seconds", lambda run: next(seconds))
    with pytest.raises(ValueError, match="eight-bit products take 100 times as long as float32 ones"):
        dtypes.choose_dtype("int8+float32", torch.device("cpu"), None)


def test_speed_is_measured_on_one_core(monkeypatch, cores):
    seen = []
    monkeypatch.setattr(int8, "_seconds", lambda run: seen.append(torch.get_num_threads()) or 1.0)
    cores(4)
    check_products()
    assert seen == [1, 1]
    assert torch.get_num_threads() == 4


def test_a_torch_without_the_product_is_an_error(monkeypatch):
    def absent(*_):
        raise NotImplementedError("Could not run 'onednn::qlinear_pointwise'")

    monkeypatch.setattr(Int8Linear, "__call__", absent)
    with pytest.raises(ValueError, match="has no eight-bit product for this processor"):
        check_products()
