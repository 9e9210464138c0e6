"""What the attention kernels compile to for each architecture, against a table that may not get worse.

`compiled.json` holds a row for each Triton version and configuration; after a deliberate change write it anew with
`python -m bivec.benchmarks.compiled_kernels --write tests/kernels/compiled.json` (and the arguments below).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

SHARED_MEMORY_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448}  # bytes a block may ask for
TABLE = Path(__file__).with_name("compiled.json")
SIXTEEN_BIT = ("bfloat16", "float16")


def compiled(*arguments: str) -> dict[str, dict]:
    """Rows by name, from a process of its own: in this one triton may stand for its interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "bivec.benchmarks.compiled_kernels", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])["kernels"]


def check(rows: dict[str, dict]) -> None:
    accepted = json.loads(TABLE.read_text()).get(triton.__version__, {})
    for name, row in rows.items():
        architecture, dtype, head_dim, *_ = name.split()
        capability = int(architecture.removeprefix("sm_"))
        assert row["shared_bytes"] <= SHARED_MEMORY_LIMIT[capability], name
        if capability == 90 and dtype in SIXTEEN_BIT:
            # tiles of D <= 128 have 64 rows or more
            assert row["wgmma"] > 0 or int(head_dim[1:]) > 128, f"{name} does not use Hopper's matrix instructions"
            assert row["spilled_bytes"] == 0 or int(head_dim[1:]) > 128, f"{name} spills"
        if name in accepted:
            for key in ("registers", "spilled_bytes", "shared_bytes"):
                assert row[key] <= accepted[name][key], f"{name}: {key}"
            assert row["wgmma"] >= min(accepted[name]["wgmma"], 1), name


@pytest.mark.parametrize(
    "arguments",
    [
        "--capability 90 --dtype bfloat16 --head-dim 64 128 --mask plain dropout",
        "--capability 80 100 --dtype bfloat16 --head-dim 128 --mask plain",
    ],
    ids=["hopper", "ampere-blackwell"],
)
def test_kernels_compile_as_well_as_before(arguments):
    check(compiled(*arguments.split()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("capability", ["80", "89", "90", "100"])
def test_every_configuration_compiles(capability, dtype):
    check(compiled("--capability", capability, "--dtype", dtype, "--mask", "plain", "dropout"))


def test_the_table_holds_what_is_promised_for_every_version():
    """The committed rows keep the promises too, so that a table cannot be rewritten to hide a loss."""
    for version, rows in json.loads(TABLE.read_text()).items():
        names = [name for name in rows if name.startswith("sm_90 bfloat16") and int(name.split()[2][1:]) <= 128]
        assert names, version
        for name in names:
            assert rows[name]["spilled_bytes"] == 0, f"{version} {name}"
            assert rows[name]["wgmma"] > 0, f"{version} {name}"
