"""The pooling kernels keep their rows in registers on every architecture; compiled without a GPU."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, torch
from bivec.benchmarks.compiled_kernels import compile_pooling
rows = {}
for size in (576, 2048, 4096):
    for dtype in ("bfloat16", "float32"):
        for name, row in compile_pooling(CAPABILITY, size, getattr(torch, dtype)).items():
            rows[f"{name} {dtype} E{size}"] = row
print(json.dumps(rows))
"""


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_pooling_compiles_without_spills(capability):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", SCRIPT.replace("CAPABILITY", str(capability))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = json.loads(result.stdout.splitlines()[-1])
    assert len(rows) == 18
    for name, row in rows.items():
        assert row["spilled_bytes"] == 0, name
        assert row["registers"] <= 255, name
