"""The LoRA benchmark on small shapes: every variant runs, and those without dropout agree with float64."""

import json

from bivec.benchmarks import lora


def test_quick_run_measures_every_variant(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(lora, "describe_machine", lambda _: {"cpu": "any", "copy_gb_per_s": 1.0})
    assert lora.main(["--quick", "--device", "cpu", "--output", str(tmp_path / "r.json")]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads((tmp_path / "r.json").read_text())
    rows = document["rows"]
    assert len(rows) == 2 * 2 * 5
    for row in rows:
        assert row["skipped"] is None
        assert row["relative"]["median"] > 0
        if row["name"] == "frozen":
            assert row["relative"]["median"] == 1
        if row["name"] in ("bivec", "PEFT"):
            assert row["error"] < (1e-5 if row["dtype"] == "float32" else 2e-2)
