"""A text's embedding is bitwise the same alone, in any batch, at any place, in any order; and the test can fail."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bivec.engine import ops
from bivec.engine.encoder import Encoder
from bivec.engine.int8 import check_products
from bivec.engine.layers import CpuLayer
from bivec.engine.model import LlamaModel
from bivec.engine.packing import PackedBatch
from bivec.engine.runner import Runner
from bivec.engine.weights import load_model
from bivec.kernels.pooling import pool

TEXT = "the quick brown fox jumps over a lazy packed batch of München 北京 😀 sequences"
WORDS = TEXT.split()
NEEDLES = ["fox", " ".join(WORDS), " ".join(WORDS * 4), " ".join(WORDS * 30)]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def encoder(request, wide_llama_folder) -> Encoder:
    return Encoder.from_pretrained(wide_llama_folder, dtype=request.param, max_length=200)


@pytest.fixture(scope="module")
def wide_llama_folder(tmp_path_factory, make_checkpoint):
    """Wide enough that the order of summation shows: tiny products hide it."""
    return make_checkpoint(
        tmp_path_factory.mktemp("wide"),
        num_hidden_layers=3,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        initializer_range=0.05,
    )


def skip_without_int8() -> None:
    try:
        check_products()
    except ValueError as error:
        pytest.skip(str(error))


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_vector_is_bitwise_the_same_in_any_company(encoder, data):
    needle = data.draw(st.sampled_from(NEEDLES))
    company = data.draw(st.lists(st.integers(1, 60).map(lambda n: " ".join((WORDS * 11)[:n])), max_size=30))
    place = data.draw(st.integers(0, len(company)))
    alone = encoder.encode(needle)
    together = encoder.encode([*company[:place], needle, *company[place:]])
    assert alone.tobytes() == together[place].tobytes()


def test_order_permutes_and_nothing_else(encoder):
    texts = [" ".join((WORDS * 11)[: 1 + 7 * i % 140]) for i in range(24)]
    order = np.random.default_rng(0).permutation(len(texts))
    vectors = encoder.encode(texts)
    assert np.array_equal(encoder.encode([texts[i] for i in order]), vectors[order])
    assert np.array_equal(encoder.encode(texts), vectors)


def test_amount_of_other_text_does_not_matter(encoder):
    alone = encoder.encode(NEEDLES[2])
    for count in (1, 15, 16, 17, 100):
        assert np.array_equal(encoder.encode([*["brown fox"] * count, NEEDLES[2]])[-1], alone)


def test_smaller_slabs_give_the_same_bits(encoder):
    texts = [" ".join((WORDS * 11)[: 1 + 11 * i % 140]) for i in range(24)]
    vectors = encoder.encode(texts)
    slab_tokens = encoder.slabs.tokens
    try:
        encoder.slabs.tokens = 208
        assert np.array_equal(encoder.encode(texts), vectors)
    finally:
        encoder.slabs.tokens = slab_tokens


ON_TWO_CORES = """
import json, sys, threading, torch
from bivec import Encoder
from bivec.engine import slabs as engine
encoder = Encoder.from_pretrained(sys.argv[1], dtype=sys.argv[2], max_length=200)
words = sys.argv[3].split() * 11
texts = [" ".join(words[: 1 + 7 * i % 140]) for i in range(48)]
seen = []
run_side_by_side = engine.run_side_by_side
def watched(run, slabs, *cores):
    def run_watched(slab):
        seen.append((threading.get_ident(), torch.get_num_threads()))
        return run(slab)
    return run_side_by_side(run_watched, slabs, *cores)
engine.run_side_by_side = watched
together = encoder.encode(texts)
states = encoder.encode(texts, output_value="token_embeddings")
later = []
thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
thread.start(), thread.join()
print(json.dumps({
    "passes at once": encoder.runner.passes_at_once,
    "threads": len({thread for thread, _ in seen}),
    "cores a pass": sorted({cores for _, cores in seen}),
    "cores after": [torch.get_num_threads(), *later],
    "passes": len(seen),
    "same vectors": all(
        encoder.encode(text).tobytes() == row.tobytes() for text, row in zip(texts[::3], together[::3])
    ),
    "same states": all(
        encoder.encode(text, output_value="token_embeddings").tobytes() == rows.tobytes()
        for text, rows in zip(texts[::10], states[::10])
    ),
}))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8+bfloat16"])
def test_passes_side_by_side_give_the_bits_of_one_on_all_cores(python, wide_llama_folder, dtype):
    if dtype.startswith("int8"):
        skip_without_int8()
    found = python(ON_TWO_CORES, wide_llama_folder, dtype, TEXT, OMP_NUM_THREADS="2")
    assert found.pop("passes") >= 8  # four at least of each call
    assert found.pop("threads") >= 2
    assert found == {
        "passes at once": 2,
        "cores a pass": [1],
        "cores after": [2, 2],
        "same vectors": True,
        "same states": True,
    }


ALONE_AND_IN_COMPANY = """
import json, sys, numpy, torch
from bivec import Encoder
words = sys.argv[1].split() * 4
texts = [" ".join(words[:length]) for length in (1, 2, 3, 4, 5, 6, 7, 9, 13, 30)]
found, samples = [], {}
for folder in sys.argv[2:]:
    for dtype in ("float32", "bfloat16"):
        on_one_core = None
        for cores in (1, 2, 4):
            torch.set_num_threads(cores)
            encoder = Encoder.from_pretrained(folder, dtype=dtype, max_length=90)
            alone = numpy.stack([encoder.encode(text) for text in texts])
            on_one_core = alone if on_one_core is None else on_one_core
            same = [numpy.tile(alone, (count, 1)) == encoder.encode(texts * count) for count in (2, 5)]
            sample = encoder.identity()["sample"]
            same += [alone == on_one_core, sample == samples.setdefault((folder, dtype), sample)]
            found.append([bool(numpy.all(part)) for part in same])
print(json.dumps(found))
"""


def test_heads_of_any_size_and_number_on_any_number_of_cores(python, make_checkpoint, tmp_path):
    """Among them those whose attention torch computes in other ways in company, or on other numbers of cores."""
    folders = [
        make_checkpoint(
            tmp_path / f"{size}-{heads}-{groups}",
            num_hidden_layers=2,
            head_dim=size,
            num_attention_heads=heads,
            num_key_value_heads=groups,
        )
        for size, *shapes in ((8, (1, 1), (4, 4)), (16, (1, 1), (4, 2)), (24, (1, 1), (4, 1)), (64, (1, 1), (2, 2)))
        for heads, groups in shapes
    ]
    found = python(ALONE_AND_IN_COMPANY, TEXT, *folders, OMP_WAIT_POLICY="passive")  # of cores that there may not be
    assert found == [[True] * 4] * (len(folders) * 2 * 3)


@pytest.fixture
def tainted_attention(monkeypatch):
    """tainted_attention(taint): attention `(B, L, H, D)` that is larger by `taint(B, L)`."""
    true_attention = ops.scaled_dot_product_attention

    def tainted_attention(taint):
        monkeypatch.setattr(
            ops,
            "scaled_dot_product_attention",
            lambda query, *arguments: true_attention(query, *arguments) + taint(*query.shape[:2]),
        )

    return tainted_attention


def assert_company_changes_nothing(encoder):
    texts = [" ".join((WORDS * 4)[: 1 + place % 9]) for place in range(40)]
    together = encoder.encode(texts)
    for place in range(20):
        assert np.array_equal(encoder.encode(texts[place]), together[place])


def test_attention_that_depends_on_its_company_takes_sequences_one_by_one(tiny_llama_folder, tainted_attention, caplog):
    tainted_attention(lambda num_sequences, length: 1e-3 if num_sequences > 2 and length == 7 else 0.0)
    encoder = Encoder.from_pretrained(tiny_llama_folder, dtype="float32")
    found = "attention over 7 tokens has other bits among equals than alone"
    assert f"{found}: sequences are attended one by one" in caplog.text
    assert encoder.describe()["backend"]["equal-length attention"] == f"one by one: {found}"
    assert_company_changes_nothing(encoder)


def test_attention_of_what_is_taken_in_batches_is_not_tried(tiny_llama_folder, tainted_attention, cores, monkeypatch):
    monkeypatch.setattr(ops, "attends_in_batches", lambda *_: True)
    model = load_model(LlamaModel, tiny_llama_folder, torch.float32)
    cores(4)
    tainted_attention(lambda num_sequences, length: 1e-3 * (torch.get_num_threads() - 1) if length == 33 else 0.0)
    runner = Runner(model, "sdpa")
    if not runner.in_batches:
        pytest.skip("batches have other bits in company on this processor")
    assert runner.one_core == ""
    monkeypatch.setattr(ops, "attends_in_batches", lambda *_: False)
    assert Runner(model, "sdpa").one_core == "attention over 33 tokens has other bits on 4 cores than on one"


def test_attention_that_depends_on_the_number_of_cores_has_one(tiny_llama_folder, tainted_attention, cores, caplog):
    cores(4)
    tainted_attention(lambda num_sequences, length: 1e-3 * (torch.get_num_threads() - 1) if length == 7 else 0.0)
    encoder = Encoder.from_pretrained(tiny_llama_folder, dtype="float32")
    found = "attention over 7 tokens has other bits on 4 cores than on one"
    assert f"{found}: passes run on one core each" in caplog.text
    assert encoder.describe()["backend"]["cores a pass"] == f"1: {found}"
    assert encoder.runner.passes_at_once == 4
    assert_company_changes_nothing(encoder)
    batch = PackedBatch.from_sequences([list(range(7))])
    for states in zip(*(encoder.runner.all_hidden_states(batch) for _ in range(2)), strict=True):
        assert torch.equal(*states)
        assert torch.get_num_threads() == 4
    assert torch.get_num_threads() == 4

    cores(1)
    alone = Encoder.from_pretrained(tiny_llama_folder, dtype="float32")
    assert alone.describe()["backend"]["cores a pass"] == "any number, with the same bits"
    vectors = alone.encode(WORDS)
    assert np.array_equal(encoder.encode(WORDS), vectors)
    cores(2)  # more than there were when it was loaded
    assert np.array_equal(alone.encode(WORDS), vectors)
    assert alone.encode("a " * 20).any()


@pytest.mark.parametrize(("all_cores", "at_once", "shown"), [(2, 2, 2), (8, 8, 8), (17, 8, 17)])
def test_products_that_depend_on_the_number_of_cores_have_one(encoder, monkeypatch, cores, all_cores, at_once, shown):
    cores(all_cores)
    assert Runner(encoder.model, "sdpa").one_core == ""

    finish = CpuLayer.finish

    def core_dependent(self, hidden, attended, tiles):
        finish(self, hidden, attended, tiles)
        hidden *= torch.get_num_threads()

    monkeypatch.setattr(CpuLayer, "finish", core_dependent)
    runner = Runner(encoder.model, "sdpa")
    assert runner.passes_at_once == at_once
    assert runner.one_core == f"a pass has other bits on {shown} cores than on one"
    assert runner.tiles == (16, 64, 512)


def test_control_products_that_depend_on_their_rows_are_noticed(encoder, monkeypatch):
    """Were they not, the tests above could not fail. A stand-in: on some processors one row has the bits of many."""
    finish = CpuLayer.finish

    def row_dependent(self, hidden, attended, tiles):
        finish(self, hidden, attended, tiles)
        for tile in tiles:
            hidden[tile] *= 1 + 1e-3 * (tile.stop - tile.start)

    monkeypatch.setattr(CpuLayer, "finish", row_dependent)
    with pytest.raises(AssertionError):
        assert_company_changes_nothing(encoder)


def test_control_pooling_one_token_of_the_neighbour_differs(encoder):
    ids = [[5, 6, 7, 8, 9], [10, 11, 12]]
    other = [[5, 6, 7, 8, 9], [20, 21, 22]]

    def first_vector(sequences, spill):
        batch = PackedBatch.from_sequences(sequences)
        bounds = batch.cu_seqlens.clone()
        bounds[1] += spill
        return pool(encoder.runner(batch), bounds)[0]

    assert torch.equal(first_vector(ids, 0), first_vector(other, 0))
    assert not torch.equal(first_vector(ids, 1), first_vector(other, 1))


def test_tiles_that_disagree_are_dropped(encoder, monkeypatch):
    """A product that depends on its number of rows must be noticed when the runner is made."""
    finish = CpuLayer.finish

    def row_dependent(self, hidden, attended, tiles):
        finish(self, hidden, attended, tiles)
        hidden *= 1.0 if tiles[0].stop > 16 else 1.1

    monkeypatch.setattr(CpuLayer, "finish", row_dependent)
    assert Runner(encoder.model, "sdpa").tiles == (64, 512)


def test_a_layer_that_never_gives_the_same_twice_is_an_error(encoder, monkeypatch):
    finish, calls = CpuLayer.finish, itertools.count()

    def restless(self, hidden, attended, tiles):
        finish(self, hidden, attended, tiles)
        hidden += next(calls)

    monkeypatch.setattr(CpuLayer, "finish", restless)
    with pytest.raises(RuntimeError, match="self-test: a layer over 512 rows does not give the same bits twice"):
        Runner(encoder.model, "sdpa")


def test_a_layer_that_gives_nan_is_an_error(encoder, monkeypatch):
    monkeypatch.setattr(encoder.model.layers[0].input_layernorm, "eps", float("nan"))
    with pytest.raises(ValueError, match="the first layer gives NaN: its weights or numbers of the configuration"):
        Runner(encoder.model, "sdpa")
