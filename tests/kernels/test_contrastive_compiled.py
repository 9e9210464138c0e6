"""What the contrastive loss's kernels compile to: on Hopper products run on tensor cores and, unless groups take their
registers, do not spill."""

import pytest


@pytest.mark.parametrize(
    ("arguments", "num_rows"),
    [
        ("--capability 90 --dtype bfloat16 --num-keys 65536 --terms plain", 7),
        pytest.param("--dtype bfloat16 float32", 174, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_without_spills(compiled, arguments, num_rows):
    rows = compiled("compiled_contrastive.json", "--operation", "contrastive", *arguments.split())
    assert len(rows) == num_rows
    for name, row in rows.items():
        product = any(word in name for word in ("probabilities", "repair", "statistics", "gradient_kernel", "small"))
        if "finish" in name or not product:
            assert row["spilled_bytes"] <= 64, f"{name} spills"
            assert row["registers"] <= 64, name
        elif "sm_90 bfloat16" in name:
            assert row["wgmma"] > 0, f"{name} has no product on tensor cores"
            if "plain" in name:
                assert row["spilled_bytes"] <= 16, f"{name} spills"
