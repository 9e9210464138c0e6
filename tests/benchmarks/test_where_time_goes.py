"""Where a token's time goes: groups sum to the time measured, and oneDNN's timer is read."""

import json

import pytest
import torch

from bivec.benchmarks import where_time_goes
from bivec.benchmarks.breakdown import GROUPS

QUICK = ["--quick", "--synthetic", "--device", "cpu"]


def test_groups_sum_to_the_time_of_a_token(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(where_time_goes, "describe_machine", lambda: {"cpu": "any"})
    assert where_time_goes.main([*QUICK, "--dtypes", "float32", "int8", "--output", str(tmp_path / "r.json")]) == 0
    document = json.loads((tmp_path / "r.json").read_text())
    assert document == json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [row["name"] for row in document["rows"]] == ["float32", "int8"]
    for row in document["rows"]:
        if row["skipped"]:  # a processor without eight-bit products
            assert row["name"] == "int8"
            continue
        assert sum(row[group] for group in GROUPS) == pytest.approx(row["us_per_token"])
        assert row["us_per_token"] * row["tokens_per_s"] == pytest.approx(torch.get_num_threads() * 1e6)


def test_a_gpu_is_refused():
    with pytest.raises(ValueError, match="--device must be cpu, got cuda"):
        where_time_goes.main(["--quick", "--device", "cuda"])


def test_onednn_s_own_timer_sees_its_products_and_leaves_the_output_alone(capfd):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    x = torch.randn(300, 300)
    packed = torch.ops.mkldnn._reorder_linear_weight(torch.randn(300, 300), 300)
    print("before")
    found = where_time_goes.onednn_seconds(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"
    assert sum(found.values()) > 0


def test_executions_are_summed_by_kind_and_implementation():
    text = """onednn_verbose,v1,info,oneDNN v3.11.0
onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx512_core,undef,src:f32:a:any,attr,,64x576:576x960,0.5
onednn_verbose,v1,primitive,exec,cpu,reorder,jit:uni,undef,src:f32:a:any,,,576x960,0.25
onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx512_core,undef,src:f32:a:any,attr,,64x576:576x960,1.5e+00
onednn_verbose,v1,primitive,create:cache_miss,cpu,matmul,brg_matmul:avx512_core,undef,src:f32,,,64x576,7.5
"""
    found = where_time_goes.parse_verbose(text)
    assert list(found) == ["matmul brg_matmul:avx512_core", "reorder jit:uni"]
    assert list(found.values()) == pytest.approx([2e-3, 0.25e-3])
