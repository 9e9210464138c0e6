"""Texts are divided into slabs that memory holds, each text into one; a failure ends the passes beside it."""

import threading
import time

import numpy as np
import pytest
import torch

from bivec import Encoder
from bivec.engine.slabs import Slabs, run_one_ahead, run_side_by_side
from bivec.engine.tokens import Tokenized

TEXTS = [" ".join(["fox"] * (1 + 7 * place % 90)) for place in range(60)]


@pytest.fixture
def encoder(tiny_llama_folder):
    return Encoder.from_pretrained(tiny_llama_folder, dtype="float32", max_length=100)


@pytest.fixture
def memory(encoder, monkeypatch):
    """memory(tokens): from here on a pass of more runs out of it; returns the sizes of those that did not."""

    def memory(tokens: int) -> list[int]:
        def limited(batch, *arguments):
            if batch.num_tokens > tokens:
                raise torch.OutOfMemoryError(f"{batch.num_tokens} tokens")
            passed.append(batch.num_tokens)
            return runner(batch, *arguments)

        passed: list[int] = []
        runner = encoder.runner
        monkeypatch.setattr(encoder, "runner", limited)
        return passed

    return memory


def test_smaller_slabs_where_memory_runs_out(encoder, memory, caplog):
    vectors = encoder.encode(TEXTS)
    before = encoder.slabs.tokens
    passed, seen = memory(600), []
    assert np.array_equal(encoder.encode(TEXTS), vectors)
    assert encoder.slabs.tokens == before // 8 == 512
    assert [record.message for record in caplog.records] == [
        f"out of memory with passes of {before >> halved} tokens: from here on of {before >> halved + 1}"
        for halved in range(3)
    ]
    assert sum(passed) == sum(len(text.ids) for text in encoder.tokenize_rows(TEXTS))

    encoder.encode_rows(TEXTS, progress=lambda texts, tokens: seen.append((texts, tokens)))
    assert [tokens for _, tokens in seen] == passed[len(passed) // 2 :]
    assert sum(texts for texts, _ in seen) == len(TEXTS)
    assert len(caplog.records) == 3


def test_captured_graphs_are_forgotten_before_smaller_slabs_are_tried():
    events = []

    def run(slab, batch):
        events.append(batch.num_tokens)
        if "released" not in events:
            raise torch.OutOfMemoryError("no memory")

    texts = [Tokenized([1] * 32, 0)] * 128
    slabs = Slabs(torch.device("cpu"), longest=64, at_once=1, tile=64, release=lambda: events.append("released"))
    list(slabs.map(run, texts))
    assert events == [4096, "released", 2048, 2048]


def test_memory_for_no_text_at_all(encoder, memory):
    memory(30)
    with pytest.raises(RuntimeError, match="out of memory with a text of 90 tokens: choose a smaller max_length"):
        encoder.encode(TEXTS)
    assert encoder.encode(TEXTS[:2]).shape == (2, 64)


@pytest.mark.parametrize(("at_once", "num_slabs"), [(1, 1), (2, 16), (3, 24)])
def test_slabs_for_every_thread(at_once, num_slabs):
    texts = [Tokenized([1] * 32, 0)] * 96
    slabs = Slabs(torch.device("cpu"), longest=64, at_once=at_once, tile=64)
    found = list(slabs.map(lambda slab, batch: (slab, batch.num_tokens), texts))
    assert sorted(place for slab, _ in found for place in slab) == list(range(96))
    assert len(found) == num_slabs
    assert all(tokens == 32 * len(slab) for slab, tokens in found)


@pytest.mark.parametrize("longest", [100, 5000])
def test_a_model_of_very_long_texts_packs_short_ones_as_any_other(longest):
    slabs = Slabs(torch.device("cpu"), longest=100_000, at_once=1, tile=256)
    texts = [Tokenized([0] * length, 0) for length in [100] * 99 + [longest]]
    sizes = list(slabs.map(lambda slab, batch: batch.num_tokens, texts))
    assert max(sizes) <= max(4096, longest)
    assert sum(sizes) == 9900 + longest


def test_a_failed_pass_ends_the_others():
    def fail(slab):
        done.append(slab)
        if slab == 1:
            raise MemoryError("no room")
        time.sleep(0.001)

    done: list[int] = []
    with pytest.raises(MemoryError, match="no room"):
        list(run_side_by_side(fail, range(1000), at_once=2))
    assert len(done) < 1000
    assert sorted(run_side_by_side(lambda slab: slab + 1, [7, 8], at_once=2)) == [8, 9]


def test_a_thread_that_starts_after_all_is_done_ends_with_the_others(monkeypatch):
    class SlowBarrier(threading.Barrier):
        def wait(self, timeout=None):
            place = super().wait(timeout)
            if place == 0 and threading.current_thread() is not caller:
                time.sleep(0.2)
            if self.broken:
                raise threading.BrokenBarrierError
            return place

    def run():
        found.extend(run_side_by_side(lambda slab: slab, range(24), at_once=3))

    found: list[int] = []
    monkeypatch.setattr(threading, "Barrier", SlowBarrier)
    for _ in range(8):  # the first to wait may be the caller
        caller = threading.Thread(target=run, daemon=True)
        caller.start()
        caller.join(20)
        assert not caller.is_alive()
    assert sorted(found) == sorted([*range(24)] * 8)


def test_one_pass_is_launched_ahead():
    events = []
    for slab in run_one_ahead(lambda slab: events.append(("launched", slab)) or slab, range(4)):
        events.append(("read", slab))
    assert [slab for event, slab in events if event == "read"] == [0, 1, 2, 3]
    assert all(events.index(("read", slab)) > events.index(("launched", slab + 1)) for slab in range(3))
    assert list(run_one_ahead(str, [])) == []
