"""What the contrastive loss's kernels compile to: bound by memory, so none may spill."""

import pytest


@pytest.mark.parametrize(
    ("arguments", "num_rows"),
    [
        ("--dtype bfloat16 --num-keys 65536 --terms all", 6),
        pytest.param("--dtype bfloat16 float32 --num-keys 101 65536 --terms plain all", 48, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_without_spills(compiled, arguments, num_rows):
    rows = compiled("compiled_contrastive.json", "--operation", "contrastive", *arguments.split())
    assert len(rows) == num_rows
    for name, row in rows.items():
        assert row["spilled_bytes"] <= 16, f"{name} spills"  # ptxas gives up a word or two for another block
        assert row["registers"] <= 96, name
