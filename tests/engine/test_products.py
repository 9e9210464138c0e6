"""How matrices are multiplied is chosen by trying, and settings of torch's are put back; no GPU: with stand-ins."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from bivec import Encoder
from bivec.engine.layers import CpuLayer
from bivec.engine.model import LlamaModel
from bivec.engine.packing import PackedBatch
from bivec.engine.products import PRODUCTS, without_split_k
from bivec.engine.runner import Runner
from bivec.engine.weights import load_model


@pytest.fixture
def multiply(tiny_llama_folder, monkeypatch):
    """multiply(small, split): load a runner whose products have other bits, unless K is kept whole, in tiles of
    `split` rows and less; with it whole, of `small` rows and less."""

    def multiply(small, split):
        finish, whole = CpuLayer.finish, []
        model = load_model(LlamaModel, tiny_llama_folder, torch.float32).eval()

        def row_dependent(self, hidden, attended, tiles):
            finish(self, hidden, attended, tiles)
            hidden *= 1.1 if tiles[0].stop <= (small if whole else split) else 1.0

        @contextlib.contextmanager
        def keep_whole():
            if small is None:
                raise RuntimeError("torch has no such library")
            whole.append(True)
            yield
            whole.pop()

        monkeypatch.setattr(CpuLayer, "finish", row_dependent)
        monkeypatch.setitem(PRODUCTS, "cpu", {"as given": contextlib.nullcontext, "without split-K": keep_whole})
        runner = Runner(model, "sdpa")
        assert not whole
        return runner

    return multiply


def test_products_are_computed_so_that_most_tiles_agree(multiply, caplog):
    runner = multiply(small=16, split=64)
    assert runner.tiles == (64, 512)
    assert runner.products == "without split-K: as given, tiles of 16, 64 rows do not agree with those of 512"
    assert caplog.messages == [
        f"products are computed {runner.products}",
        "tiles of 16 rows do not agree bitwise with those of 512 rows and are not used",
    ]
    # a pass is computed as what was tried; there are 64 rows
    batch = PackedBatch.from_sequences([[5] * 40])
    assert not torch.equal(runner(batch), runner._through(runner.layers, batch, runner.windows))


@pytest.mark.parametrize(
    ("small", "split", "tiles"), [(0, 0, (16, 64, 512)), (16, 16, (64, 512)), (None, 16, (64, 512))]
)
def test_products_are_computed_as_torch_is_set_where_nothing_else_is_better(multiply, small, split, tiles):
    runner = multiply(small, split)
    assert runner.tiles == tiles
    assert runner.products == "as given"


def test_settings_of_products_hold_for_as_long_as_one_needs_them(monkeypatch):
    matmul = SimpleNamespace(
        allow_bf16_reduced_precision_reduction=True,
        allow_bf16_reduced_precision_reduction_split_k=True,
        allow_fp16_reduced_precision_reduction=False,
        allow_fp16_reduced_precision_reduction_split_k=True,
    )
    library = ["default"]

    def preferred_blas_library(name=None):
        library.append(name or library[-1])
        return library[-1]

    def settings():
        return matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction, library[-1]

    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred_blas_library)
    first, second = without_split_k(), without_split_k()
    first.__enter__()
    second.__enter__()
    assert settings() == ((False, False), (False, False), "cublaslt")
    first.__exit__(None, None, None)
    assert settings() == ((False, False), (False, False), "cublaslt")
    second.__exit__(None, None, None)
    assert settings() == ((True, True), (False, True), "default")


def test_inspect_says_how_products_are_computed(tiny_llama_folder, monkeypatch):
    encoder = Encoder.from_pretrained(tiny_llama_folder, dtype="float32")
    encoder.runner.products = "without split-K: why"
    assert "matrix products" not in encoder.describe()["backend"]
    monkeypatch.setattr(Encoder, "device", property(lambda encoder: torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert encoder.describe()["backend"]["matrix products"] == "without split-K: why"
