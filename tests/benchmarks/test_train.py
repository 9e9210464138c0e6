"""The training benchmark: sizes that fit, peers that do not, and a step of ours that computes something else."""

import pytest
import torch

from bivec.benchmarks import train
from bivec.benchmarks.shapes import SHAPES


def test_a_step_of_the_1b_shape_takes_what_was_reckoned():
    # 110,000 tokens took the estimate that refused them first: 180 GB
    assert train.step_bytes(SHAPES["1B"], 110_000, torch.bfloat16) == pytest.approx(180e9, rel=0.05)


def test_texts_are_as_many_as_half_the_memory_holds():
    lengths = [100] * 512
    fitting = train.texts_that_fit(lengths, SHAPES["1B"], torch.bfloat16, 139 * 2**30)
    assert 100 < fitting < 512
    assert train.step_bytes(SHAPES["1B"], 200 * fitting, torch.bfloat16) <= 139 * 2**30 / 2
    assert train.step_bytes(SHAPES["1B"], 200 * (fitting + 1), torch.bfloat16) > 139 * 2**30 / 2
    assert train.texts_that_fit(lengths[:128], SHAPES["1B"], torch.bfloat16, 139 * 2**30) == 128
    assert train.texts_that_fit(lengths, SHAPES["1B"], torch.bfloat16, 2**30) == 3  # a row needs them


def test_a_loss_of_its_own_has_no_speed():
    assert train.disagreement({"bivec": 9.03, "padded": 9.02, "grouped 8": None}) is None
    assert train.disagreement({"bivec": 9.03}) is None
    assert train.disagreement({"bivec": 8.0, "padded": 9.02}) == "wrong: the first loss is 8, the peers' 9.02"
    assert "wrong: the first loss is nan" in str(train.disagreement({"bivec": float("nan"), "padded": 9.0}))


def test_a_peer_without_memory_is_a_row_and_ours_is_measured(tmp_path, monkeypatch):
    from bivec.benchmarks.shapes import write_checkpoint
    from bivec.benchmarks.texts import synthetic_mix

    class NoMemory(train.PeerStep):
        def __call__(self) -> None:
            if len(self.batches) == 3:  # a batch a column
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB\nmore words")
            super().__call__()

    monkeypatch.setattr(train, "PeerStep", NoMemory)
    monkeypatch.setattr(train, "GROUPS", (4, 6))
    texts = list(dict.fromkeys(synthetic_mix(24)))[:12]
    write_checkpoint(SHAPES["quick"], tmp_path, texts)
    cpu = torch.device("cpu")
    rows = train.run_stage("supervised", SHAPES["quick"], str(tmp_path), texts, "float32", cpu, rounds=1)
    ours, padded, grouped = sorted(rows, key=lambda row: [train.OURS, train.PADDED, train.GROUPED].index(row["name"]))
    assert ours["skipped"] is None
    assert ours["tokens_per_s"] > 0
    assert padded["skipped"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 99 GiB"
    assert grouped["bivec_speedup"]["median"] > 0
    assert (grouped["group"], grouped["first_loss"]) == (
        pytest.approx(5, abs=1),
        pytest.approx(ours["first_loss"], rel=1e-3),
    )
