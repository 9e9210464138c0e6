"""What the attention kernels compile to for each architecture, against `compiled.json`."""

import json
from pathlib import Path

import pytest

TABLE = "compiled.json"
SIXTEEN_BIT = ("bfloat16", "float16")


def check(rows: dict[str, dict]) -> None:
    for name, row in rows.items():
        architecture, dtype, head_dim, *_ = name.split()
        # tiles of D <= 128 have 64 rows or more
        if architecture == "sm_90" and dtype in SIXTEEN_BIT and int(head_dim[1:]) <= 128:
            assert row["wgmma"] > 0, f"{name} does not use Hopper's matrix instructions"
            assert row["loop_spilled_bytes"] == 0, f"{name} spills in its main loop"


@pytest.mark.parametrize(
    "arguments",
    [
        "--capability 90 --dtype bfloat16 --head-dim 64 128 --mask plain dropout",
        "--capability 80 100 --dtype bfloat16 --head-dim 128 --mask plain",
    ],
    ids=["hopper", "ampere-blackwell"],
)
def test_kernels_compile_as_well_as_before(compiled, arguments):
    check(compiled(TABLE, *arguments.split()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("capability", ["80", "89", "90", "100"])
def test_every_configuration_compiles(compiled, capability, dtype):
    check(compiled(TABLE, "--capability", capability, "--dtype", dtype, "--mask", "plain", "dropout"))


def test_the_table_holds_what_is_promised_for_every_version():
    """The committed rows keep the promises too, so that a table cannot be rewritten to hide a loss."""
    for rows in json.loads(Path(__file__).with_name(TABLE).read_text()).values():
        check({name: row for name, row in rows.items() if name.startswith("sm_90 bfloat16")})
