"""The tuner of attention's tiles, interpreted: what it tries, refuses, measures, goes on with, and writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bivec.benchmarks import tune_attention
from bivec.benchmarks.tune_attention import KERNELS, Row, Tuner, neighbours, refusal, rows_of, tuned
from bivec.kernels.attention import tiles
from bivec.kernels.attention.tiles import INTERPRETER, AttentionTiles, Tiles

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled, not interpreted")
ROW = Row("interpreter 32-bit D16 plain", (16,), "plain", INTERPRETER)
ARGUMENTS = [
    "--quick",
    "--device",
    "cpu",
    "--mask",
    "plain",
    "--kernel",
    "short_forward",
    "--most",
    "2",
    "--rounds",
    "1",
]


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(tune_attention, "describe_machine", lambda *_, **__: {"cpu": "any"})


def run(*arguments):
    return tune_attention.main([*ARGUMENTS, *map(str, arguments)])


def test_neighbours_are_what_the_kernel_can_take(monkeypatch):
    monkeypatch.setattr(tune_attention, "TILE_ROWS", 128)
    monkeypatch.setattr(tune_attention, "INTERPRETED", False)
    for capability in ((8, 0), (9, 0), (12, 0)):
        for row in rows_of([64, 96, 128, 256], ["plain", "window"], capability):
            for kernel in KERNELS:
                found = neighbours(kernel, row.present, 99)
                assert found[0] == getattr(row.present, kernel)
                assert len(set(found)) == len(found) > 3
                for tile in found[1:]:
                    assert all(size >= 16 and size & (size - 1) == 0 for size in tile[:2])
                    if kernel.startswith("short"):
                        assert tile.block_n >= row.present.short
                    else:
                        assert 128 % (tile.block_n if kernel == "backward_dkv" else tile.block_m) == 0


def test_rows_are_those_that_the_device_has():
    rows = rows_of([64, 96, 128], ["plain", "window"], (9, 0))
    assert [(row.name, row.head_dims) for row in rows] == [
        ("sm_90 16-bit D64 plain", (64,)),
        ("sm_90 16-bit D128 plain", (96, 128)),
        ("sm_90 16-bit D64 window", (64,)),
        ("sm_90 16-bit D128 window", (96, 128)),
    ]
    assert all(tiles.load_table()[row.name] == row.present for row in rows)


def test_what_spills_or_does_not_fit_is_refused():
    fine = {"spilled_bytes": 0, "shared_bytes": 160 * 1024}
    assert refusal(fine, 90) is refusal(fine, 100) is None
    assert refusal(fine, 89) == "takes 163840 bytes of shared memory, there are 101376"
    assert refusal(fine | {"spilled_bytes": 8}, 90) == "spills 8 bytes"
    assert refusal("CompilationError: no", 90) == "CompilationError: no"


def test_wrong_and_refused_variants_have_no_time(monkeypatch):
    present, *others = neighbours("short_forward", INTERPRETER, 3)
    compute = tune_attention.bivec

    def wrong_for_one(case, inputs):
        prepared = compute(case, inputs)
        attend = prepared.attend

        def attend_wrongly(q, k, v):
            given = tune_attention.operator.attention_tiles().short_forward
            return attend(q, k, v) * (1.01 if given == others[0] else 1.0)

        prepared.attend = attend_wrongly
        return prepared

    monkeypatch.setattr(tune_attention, "bivec", wrong_for_one)
    compiled = {tune_attention.variant_name(16, "plain", "short_forward", others[1]): "spilled"}
    tuner = Tuner(torch.device("cpu"), 0, compiled, rounds=1, most=3, quick=True)
    rows = tuner.measure(ROW, "short_forward")
    found = {tuple(row["tile"]): row["skipped"] for row in rows}
    assert found[present] is None
    assert found[others[0]].startswith("wrong: error 0.0")
    assert found[others[1]] == "spilled"
    assert all((row["median_s"] is None) == bool(row["skipped"]) for row in rows)


def test_a_tile_is_taken_that_is_faster_over_all_its_workloads(capsys):
    present, first, second, third = [32, 16, 1, 1], [16, 16, 1, 1], [64, 16, 1, 1], [32, 32, 1, 1]
    seconds = {
        "forward": {
            "a": [(present, 1.0), (first, 0.5), (second, 0.9)],
            "b": [(present, 4.0), (first, 9.0), (second, 3.6)],
        },
        "backward_dq": {"a": [(present, 1.0), (first, 0.99)]},  # noise
        "short_forward": {"a": [(present, 1.0), (third, 0.5)], "b": [(present, 1.0), (third, None)]},
        "short_backward": {"a": [(present, None), (first, 0.5)]},
    }
    measured = [
        {"row": ROW.name, "kernel": kernel, "workload": workload, "tile": tile, "median_s": median}
        for kernel, workloads in seconds.items()
        for workload, variants in workloads.items()
        for tile, median in variants
    ]
    measured.append({"case": "another", "name": "all", "skipped": "ended its process 2 times"})
    assert tuned([ROW], measured) == {ROW.name: INTERPRETER._replace(forward=Tiles(*second))}
    assert capsys.readouterr().err == f"{ROW.name} forward: {present} -> {second}, 0.900 of its time\n"


def test_a_run_goes_on_and_writes_a_table_beside_its_result(tmp_path, monkeypatch, capsys):
    output, table = tmp_path / "tune.json", tmp_path / "tune.tiles.json"
    before = tiles.TABLE.read_bytes()
    assert run("--output", output) == 0
    row = json.loads(table.read_text())[ROW.name]
    assert AttentionTiles(**row)._replace(short_forward=None) == tuple(
        list(tile) if isinstance(tile, tuple) else tile for tile in INTERPRETER._replace(short_forward=None)
    )
    rows = json.loads(output.read_text())["rows"]
    assert {tuple(row["tile"]) for row in rows} == set(neighbours("short_forward", INTERPRETER, 2))
    assert all(row["median_s"] > 0 for row in rows)

    monkeypatch.setattr(Tuner, "measure", lambda *_: pytest.fail("it was measured"))
    assert run("--output", output) == 0
    assert json.loads(output.read_text())["rows"] == rows
    assert tiles.TABLE.read_bytes() == before
    with pytest.raises(ValueError, match="--install needs tiles that were measured on a GPU, got --device cpu"):
        run("--output", output, "--install")
    capsys.readouterr()


def test_variants_are_compiled_without_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = "--compile-only --capability 90 --head-dim 64 --mask plain --kernel short_forward --most 2 --jobs 1"
    found = subprocess.run(
        [sys.executable, "-m", "bivec.benchmarks.tune_attention", *arguments.split()],
        env=environment | {"PYTHONPATH": str(Path(tune_attention.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(found.stdout.splitlines()[-1])["rows"]
    present = tiles.load_table()["sm_90 16-bit D64 plain"].short_forward
    assert rows[0]["name"] == f"D64 plain short_forward {tune_attention.tile_name(present)}"
    assert rows[0]["refused"] is None
    assert rows[0]["wgmma"] > 0
    assert len(rows) == 2
    assert all(row["registers"] > 0 for row in rows)
