"""The pooling kernels keep their rows in registers on every architecture; compiled without a GPU."""

import pytest


@pytest.mark.parametrize("norm", [pytest.param("none", marks=pytest.mark.slow), "rms"])
@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_kernels_compile_without_spills(compiled, capability, norm):
    arguments = ("--operation", "pooling", "--capability", capability, "--norm", norm)
    rows = compiled("compiled_pooling.json", *arguments)
    assert len(rows) == 18  # three kernels, three sizes, two dtypes
    for name, row in rows.items():
        assert row["spilled_bytes"] <= 16, f"{name} spills"  # ptxas gives up a word or two for another block
