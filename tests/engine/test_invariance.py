"""A text's embedding is bitwise the same alone, in any batch, at any place, in any order; and the test can fail."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bivec.engine.encoder import Encoder
from bivec.engine.layers import CpuLayer
from bivec.engine.packing import PackedBatch
from bivec.engine.runner import Runner
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
def watched(run, slabs, at_once):
    def run_watched(slab):
        seen.append((threading.get_ident(), torch.get_num_threads()))
        return run(slab)
    return run_side_by_side(run_watched, slabs, at_once)
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_passes_side_by_side_give_the_bits_of_one_on_all_cores(wide_llama_folder, dtype):
    command = [sys.executable, "-c", ON_TWO_CORES, str(wide_llama_folder), dtype, TEXT]
    environment = os.environ | {
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    found = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
    assert found.pop("passes") >= 8  # four at least of each call
    assert found.pop("threads") >= 2
    assert found == {
        "passes at once": 2,
        "cores a pass": [1],
        "cores after": [2, 2],
        "same vectors": True,
        "same states": True,
    }


@pytest.mark.parametrize(("cores", "at_once", "cores_each"), [(2, 2, 1), (8, 8, 1), (17, 8, 2)])
def test_passes_that_disagree_run_one_at_a_time(encoder, monkeypatch, caplog, cores, at_once, cores_each):
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert encoder.runner._agreeing_passes() == at_once
    assert asked == [cores_each, cores]

    through, calls = Runner._through, iter(range(2))
    monkeypatch.setattr(Runner, "_through", lambda *arguments: through(*arguments) + next(calls))
    assert encoder.runner._agreeing_passes() == 1
    assert f"a pass on {cores_each} of {cores} cores does not agree bitwise with one on all" in caplog.text


def test_control_one_row_products_differ(encoder):
    """The same text through products of one row: were these equal too, the tests above could not fail."""
    batch = PackedBatch.from_sequences([list(range(5, 65))])
    tiles = encoder.runner.tiles
    expected = encoder.runner(batch)
    try:
        encoder.runner.tiles = (1,)
        assert not torch.equal(encoder.runner(batch), expected)
    finally:
        encoder.runner.tiles = tiles


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
