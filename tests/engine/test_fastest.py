"""Which attention is chosen where none is asked for: what a table of measurements says, if its bits hold."""

import json

import pytest
import torch

from bivec import Encoder
from bivec.engine import fastest, ops
from bivec.engine.config import load_config
from bivec.kernels import reference

CUDA = torch.device("cuda", 0)


@pytest.fixture
def choose(make_checkpoint, tmp_path, monkeypatch):
    """choose(seconds, taint): the choice on "Some GPU" where these were measured, grouped bfloat16 heads of 16.

    `taint` is what the number of sequences adds to torch's varlen.
    """

    def choose(seconds, taint=0.0, **shape):
        def attention(query, key, value, batch, window, backend):
            assert backend in ("varlen", "flash")
            output = reference.varlen_attention(
                query, key, value, batch.cu_seqlens, batch.max_seqlen, window_size=window
            )
            return output + taint * len(batch.seqlens)

        config = load_config(make_checkpoint(tmp_path, **shape))
        table = tmp_path / "table.json"
        entry = {"measured": "2026-01-02", "seconds": {"bfloat16 D16 grouped": seconds}}
        table.write_text(json.dumps({"Some GPU": entry} if seconds else {}))
        monkeypatch.setattr(fastest, "TABLE", table)
        monkeypatch.setattr(ops, "attention", attention)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        # heads are made on the device
        monkeypatch.setattr(fastest, "differs_in_company", on_cpu(fastest.differs_in_company))
        return fastest.fastest_backend(config, CUDA, torch.bfloat16)

    def on_cpu(differs):
        return lambda backend, config, device, dtype: differs(backend, config, torch.device("cpu"), torch.float32)

    return choose


def test_what_was_measured_to_be_fastest_is_chosen(choose):
    found = choose({"triton": 3e-4, "varlen": 1e-4})
    assert found == (
        "varlen",
        "measured 3.0 times as fast as bivec's for bfloat16 D16 grouped on Some GPU, 2026-01-02",
    )


@pytest.mark.parametrize(
    ("seconds", "why"),
    [
        ({}, "no other was measured for bfloat16 D16 grouped on Some GPU"),
        (
            {"triton": 3e-4, "varlen": 2.5e-4},
            "measured for bfloat16 D16 grouped on Some GPU, 2026-01-02: no other is worth it",
        ),
        # the package is not installed
        (
            {"triton": 3e-4, "flash": 1e-4},
            "measured for bfloat16 D16 grouped on Some GPU, 2026-01-02: no other is worth it",
        ),
    ],
)
def test_ours_is_chosen_else(choose, seconds, why):
    assert choose(seconds) == ("triton", why)


def test_ours_is_chosen_for_a_shape_that_was_not_measured(choose):
    backend, why = choose({"triton": 3e-4, "varlen": 1e-4}, num_key_value_heads=4)
    assert (backend, why) == ("triton", "no other was measured for bfloat16 D16 ungrouped on Some GPU")


def test_what_differs_in_company_is_not_chosen(choose, caplog):
    assert choose({"triton": 3e-4, "varlen": 1e-4}, taint=1e-3)[0] == "triton"
    assert caplog.messages == [
        "attention 'varlen' was measured to be faster, but: over 1 tokens it has other bits in company than alone"
    ]


def test_the_choice_and_its_reason_are_shown(tiny_llama_folder, monkeypatch):
    encoder = Encoder.from_pretrained(tiny_llama_folder, dtype="float32")
    assert encoder.describe()["backend"]["attention"] == "sdpa"
    monkeypatch.setattr("bivec.engine.encoder.fastest_backend", lambda *_: ("sdpa", "measured"))
    assert Encoder.from_pretrained(tiny_llama_folder, dtype="float32").describe()["backend"]["attention"] == (
        "sdpa: measured"
    )
