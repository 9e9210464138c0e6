"""What the LoRA linears' passes under dropout compile to: counters, keys and tiles in registers, nothing spilled."""

import pytest


@pytest.mark.parametrize(
    "capability", [pytest.param("80", marks=pytest.mark.slow), "90", pytest.param("100", marks=pytest.mark.slow)]
)
def test_kernels_compile_without_spills(compiled, capability):
    rows = compiled("compiled_lora.json", "--operation", "lora", "--capability", capability, "--hidden-size", "2048")
    assert len(rows) == 12  # three kernels, two dtypes, with and without frozen adapters
    for name, row in rows.items():
        assert row["spilled_bytes"] <= 16, f"{name} spills"  # ptxas gives up a word or two for another block
