"""What the contrastive loss's kernels compile to: bound by memory, so none may spill."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("arguments", ["--num-keys 65536 --terms plain all", "--num-keys 101 --terms all"])
def test_kernels_compile_without_spills(arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "bivec.benchmarks.compiled_kernels", "--operation", "contrastive"]
    command += ["--capability", "80", "90", "100", "--dtype", "bfloat16", *arguments.split()]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = json.loads(result.stdout.splitlines()[-1])["kernels"]
    assert len(rows) == 3 * 2 * (1 + ("plain" in arguments))
    for name, row in rows.items():
        assert row["spilled_bytes"] == 0, f"{name} spills"
        assert row["registers"] <= 96, name
