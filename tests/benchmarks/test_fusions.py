"""The benchmark of the fusions on small shapes: every variant runs and agrees with float64."""

import json

from bivec.benchmarks import fusions


def test_quick_run_measures_every_variant(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(fusions, "describe_machine", lambda _: {"cpu": "any", "copy_gb_per_s": 1.0})
    arguments = ["--quick", "--no-compile", "--device", "cpu", "--output", str(tmp_path / "r.json")]
    assert fusions.main(arguments) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads((tmp_path / "r.json").read_text())
    rows = document["rows"]
    assert len(rows) == 2 * 5 * 2
    for row in rows:
        assert row["skipped"] is None
        assert row["speedup"]["median"] > 0
        if row["name"] == "eager":
            assert row["speedup"]["median"] == 1
        assert row["error"] < (1e-5 if row["dtype"] == "float32" else 2e-2)
