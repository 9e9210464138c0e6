"""What the contrastive loss's kernels compile to: bound by memory, so none may spill."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("arguments", "num_rows"),
    [
        ("--num-keys 65536 --terms all", 6),
        pytest.param("--num-keys 101 65536 --terms plain all", 24, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_without_spills(arguments, num_rows):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "bivec.benchmarks.compiled_kernels", "--operation", "contrastive"]
    command += ["--capability", "80", "90", "100", "--dtype", "bfloat16", *arguments.split()]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = json.loads(result.stdout.splitlines()[-1])["kernels"]
    assert len(rows) == num_rows
    for name, row in rows.items():
        assert row["spilled_bytes"] == 0, f"{name} spills"
        assert row["registers"] <= 96, name
