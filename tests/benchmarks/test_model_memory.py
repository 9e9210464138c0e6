"""Memory and load time: in a fresh process, of the model alone, beside bfloat16's."""

import json
import sys

import pytest

from bivec.benchmarks import model_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")


def test_a_fresh_process_a_dtype_says_what_it_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model_memory, "describe_machine", lambda: {"cpu": "any"})
    output = tmp_path / "r.json"
    arguments = ["--quick", "--synthetic", "--dtypes", "bfloat16", "--output", str(output)]
    assert model_memory.main(arguments) == 0
    (ours,) = json.loads(output.read_text())["rows"]
    assert ours["dtype"] == "bfloat16"
    assert ours["load_s"] > 0
    assert ours["model_bytes"] == max(ours["load_peak_bytes"], ours["run_peak_bytes"]) - ours["before_bytes"]
    assert ours["memory_of_bfloat16"] == ours["load_seconds_of_bfloat16"] == 1


def test_a_process_that_fails_is_a_row_with_its_last_words(monkeypatch):
    monkeypatch.setattr(model_memory, "_CHILD", [sys.executable, "-c", "raise ValueError('no such dtype here')"])
    row = model_memory._row("float99", "model", "tiny", [], rounds=3)
    assert row == {"name": "float99", "skipped": "ValueError: no such dtype here"}


def test_what_is_loaded_shows_and_what_was_before_does_not(monkeypatch):
    loads = []

    class Large:
        compute_dtype = type("", (), {"name": "float32"})

        @classmethod
        def from_pretrained(cls, folder, **_):
            loads.append(folder)
            if folder == "tiny":  # a peak of before, which is none of the model's
                assert len(b"x" * (700 * 2**20))
            encoder = cls()
            encoder.weights = bytearray(b"x" * (200 * 2**20 if folder == "model" else 2**10))
            return encoder

        def encode(self, texts, **_):
            return bytes(b"x" * (300 * 2**20 if texts == ["timed"] else 2**10))

    monkeypatch.setattr(model_memory, "Encoder", Large)
    found = model_memory.measure_one("float32", "model", "tiny", ["timed"])
    assert loads == ["tiny", "model"]
    loaded = found["load_peak_bytes"] - found["before_bytes"]
    assert 190 * 2**20 < loaded < 450 * 2**20
    assert found["run_peak_bytes"] - found["before_bytes"] > 480 * 2**20


def test_rows_are_compared_with_bfloat16_s():
    rows = [
        {"name": "bfloat16", "model_bytes": 200, "load_s": 2.0, "skipped": None},
        {"name": "int8", "model_bytes": 100, "load_s": 3.0, "skipped": None},
        {"name": "float8", "skipped": "no GPU"},
    ]
    model_memory._compare(rows)
    assert (rows[1]["memory_of_bfloat16"], rows[1]["load_seconds_of_bfloat16"]) == (0.5, 1.5)
    assert "memory_of_bfloat16" not in rows[2]
