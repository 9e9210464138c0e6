"""What the kernels of norm, rotary, SwiGLU and cross-entropy compile to: bound by memory, so none may spill.

`compiled_fusions.json` holds a row for each Triton version and configuration; after a deliberate change write it anew
with `python -m bivec.benchmarks.compiled_kernels --operation fusions --write tests/kernels/compiled_fusions.json`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

TABLE = Path(__file__).with_name("compiled_fusions.json")


def check(name: str, row: dict) -> None:
    assert row["spilled_bytes"] <= 16, f"{name} spills"  # ptxas gives up a word or two for another block
    # at 128 registers a program of eight warps leaves room for a second one beside it
    assert row["registers"] <= 128, name


@pytest.mark.parametrize(
    ("arguments", "num_rows"),
    [
        ("--capability 90 --dtype bfloat16 --size 576 2048", 14),
        pytest.param("", 126, marks=pytest.mark.slow),
    ],
    ids=["hopper", "all"],
)
def test_kernels_compile_without_spills(arguments, num_rows):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "bivec.benchmarks.compiled_kernels", "--operation", "fusions", *arguments.split()]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = json.loads(result.stdout.splitlines()[-1])["kernels"]
    assert len(rows) == num_rows
    accepted = json.loads(TABLE.read_text()).get(triton.__version__, {})
    for name, row in rows.items():
        check(name, row)
        if name in accepted:
            assert row["registers"] <= accepted[name]["registers"], name


def test_the_table_keeps_the_promises_too():
    for version, rows in json.loads(TABLE.read_text()).items():
        assert {name.split()[0] for name in rows} == {"sm_80", "sm_90", "sm_100"}, version
        for name, row in rows.items():
            check(name, row)
