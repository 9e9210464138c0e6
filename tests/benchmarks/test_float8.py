"""float8's benchmark runs whole on a fake device, and needs a device."""

from unittest import mock

import pytest
import torch

from bivec.benchmarks import float8
from bivec.benchmarks.fake_cuda import FakeCuda
from bivec.engine import encoder as encoder_module


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: None, raising=False)
    monkeypatch.setattr(encoder_module, "check_mask", lambda *_: {})  # it looks at values
    with FakeCuda() as device:
        yield device


def test_products_in_every_way_at_every_number_of_rows(fake):
    rows = float8.products("quick", 1)
    assert [row["skipped"] for row in rows] == [None] * 18
    assert [row["rows"] for row in rows[::3]] == [256, 512, 1024, 2048, 4096, 8192]
    assert {row["name"] for row in rows if "agrees" in row} == set(float8.WAYS)
    # in the fake second, a layer's products of 2 x 256 x (256 x 128 + 128 x 128 + 768 x 128 + 128 x 384) operations
    assert rows[0]["tflops"] * 1e12 * rows[0]["median_s"] == pytest.approx(2 * 256 * 128 * (256 + 128 + 768 + 384))


def test_kernels_bytes(fake):
    """Of 8,192 rows: bfloat16 in, float8 out; a sum is read twice and written; SwiGLU reads two."""
    rows = {row["name"]: row for row in float8.kernels("quick", 1, 1.0)}
    moved = {name: row["gb_per_s"] * 1e9 * row["median_s"] for name, row in rows.items()}
    hidden, intermediate = 8192 * 128, 8192 * 384
    assert moved == pytest.approx(
        {"rows": 3 * hidden, "norm": 3 * hidden, "sum and norm": 7 * hidden, "SwiGLU": 5 * intermediate}
    )


@pytest.mark.filterwarnings("ignore:invalid value")
def test_encoding_beside_bfloat16(fake):
    bfloat16, ours = float8.encoding("quick", 8, 1)
    assert (bfloat16["dtype"], ours["dtype"]) == ("bfloat16", "float8+bfloat16")
    assert ours["speedup"]["median"] == 1.0
    assert "least_cosine" in ours
    with mock.patch.object(fake, "capability", (8, 0)), pytest.raises(ValueError, match=r"capability 8.9"):
        float8.encoding("quick", 8, 1)


def test_a_cpu_is_refused(capsys):
    with pytest.raises(SystemExit):
        float8.main(["--device", "cpu"])
    assert "float8 needs a CUDA device" in capsys.readouterr().err
