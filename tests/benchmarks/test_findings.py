"""What is said of results: the figure, the goal, the best peer; and what is wrong or missing, never in silence."""

import json

from bivec.benchmarks.findings import findings


def said(folder, name: str, rows: list[dict], **facts) -> list[str]:
    (folder / f"{name}.json").write_text(json.dumps({"benchmark": name, "rows": rows, **facts}))
    return findings(folder)


def attention_row(name: str, tflops: float | None, skipped: str | None = None) -> dict:
    seconds = None if tflops is None else 1 / tflops
    row = {"case": "D128 GQA 4, uniform 4096", "direction": "forward", "name": name, "median_s": seconds, "p90": 4096}
    return row | {"tflops": tflops, "skipped": skipped}


def test_attention_beside_its_goal_and_the_fastest_peer(tmp_path):
    rows = [attention_row("bivec", 431.0), attention_row("slow", 100.0), attention_row("torch varlen", 402.0)]
    (line,) = said(tmp_path, "attention", rows)
    assert line == (
        "attention: D128 GQA 4, uniform 4096, forward: 431 TFLOP/s, goal 450: not reached; 1.07 × torch varlen"
    )
    rows[0] |= {"tflops": 451.0}
    assert "goal 450: reached" in said(tmp_path, "attention", rows)[0]


def test_short_attention_is_a_share_of_the_copy_rate(tmp_path):
    row = attention_row("bivec", 9.0) | {"case": "D64 GQA 4, uniform 64", "p90": 64}
    row |= {"gb_per_s": 2000.0, "of_copy": 0.5}
    assert "2000 GB/s, 50% of the copy rate; no peer ran" in said(tmp_path, "attention", [row])[0]


def test_what_is_wrong_has_no_figure_and_is_said(tmp_path):
    reason = "wrong: error 0.3 of the largest value, at most 0.02"
    lines = said(tmp_path, "attention", [attention_row("bivec", None, reason), attention_row("peer", 5.0)])
    assert lines == [f"attention: NOT MEASURED, {reason} (D128 GQA 4, uniform 4096)"]


def test_what_is_left_out_or_made_up_is_said(tmp_path):
    lines = said(tmp_path, "job-1B", [], left_out={"job": "the budget"}, mix="SYNTHETIC, because")
    assert lines == [
        "job-1B: 1 cases left out: the budget",
        "job-1B: the texts are made up, not a real mix: give --data",
    ]


def test_loss_and_adapter_have_goals_of_their_own(tmp_path):
    loss = {"num_queries": 65536, "num_keys": 65536, "name": "bivec", "median_s": 0.03, "peak_growth_bytes": 2e9}
    graph = loss | {"name": "bivec, CUDA graph", "median_s": 0.029}
    (line,) = said(tmp_path, "contrastive", [loss, graph, loss | {"name": "Liger", "median_s": 0.045}])
    assert line == (
        "contrastive: 65536 × 65536: 30 ms, goal 33 ms: reached; 2.00 GB, goal 1.5: not reached"
        " (29 ms as a graph); 1.50 × Liger"
    )
    adapter = {"case": "2048 to 2048", "dtype": "bfloat16", "name": "bivec", "relative": {"median": 1.2}}
    lines = said(tmp_path, "lora", [adapter, adapter | {"name": "PEFT"}])
    assert lines[1:] == ["lora: 2048 to 2048, bfloat16, no dropout: 1.20 × the frozen linear, goal 1.15: not reached"]


def test_float8_beside_bfloat16(tmp_path):
    product = {"case": "products", "shape": "1B", "rows": 256, "median_s": 1e-3, "speedup": {"median": 1.7}}
    product |= {"tflops": 900.0, "error": 2e-3}
    encoding = {"case": "encoding", "shape": "1B", "name": "float8", "median_s": 1.0, "speedup": {"median": 1.5}}
    rows = [
        product | {"name": "bfloat16", "speedup": {"median": 1.0}},
        product | {"name": "float8", "agrees": True},
        product | {"name": "float8, fast", "agrees": False},
        {"case": "kernels", "shape": "1B", "name": "SwiGLU", "median_s": 1e-4, "of_copy": 0.9},
        encoding | {"least_cosine": 0.998, "tiles": [256, 8192]},
    ]
    assert said(tmp_path, "float8", rows) == [
        "float8: 1B, 256 rows, float8: 900 TFLOP/s, 1.70 × bfloat16, error 2.0e-03",
        "float8: 1B, 256 rows, float8, fast: 900 TFLOP/s, 1.70 × bfloat16, error 2.0e-03, other bits than the largest"
        " tile",
        "float8: 1B, SwiGLU: 90% of a copy's rate",
        "float8: 1B, encoding: 1.50 × bfloat16, least cosine to it 0.9980, tiles [256, 8192]",
    ]


def test_dropped_tiles_are_named(tmp_path):
    rows = [
        {"shape": "1B", "setting": setting, "rows": rows, "agrees": rows > 256 or setting != "default", "name": "x"}
        for setting in ("default", "no split-K")
        for rows in (256, 512)
    ]
    assert said(tmp_path, "tiles", rows) == [
        "tiles: 1B, default: tiles of 256 rows dropped",
        "tiles: 1B, no split-K: all tiles agree",
    ]


def test_models_beside_their_goals_in_the_order_of_asking(tmp_path):
    step = {"stage": "simcse", "name": "bivec", "median_s": 0.1, "tokens_per_s": 5e4, "peak_growth_bytes": 4e9}
    said(tmp_path, "train-1B", [step, step | {"name": "padded", "median_s": 0.25, "peak_growth_bytes": 16e9}])
    said(tmp_path, "smoke", [{"name": "bivec", "right": True}, {"name": "bivec", "right": True}])
    alone = {"name": "bivec auto", "tokens_per_s": 1e5, "share_of_linears": 0.55}
    spent = {"wall_s": 2.0, "work_s": 1.0, "parts": [{"name": "gemm", "share": 0.9}]}
    lines = said(tmp_path, "embed-1B", [], shape="1B", alone=alone, breakdown_of_bivec=spent)
    assert lines == [
        "smoke: 2 of 2 checks right",
        "embed-1B: 100000 tokens/s, 55% of the linears' own rate, goal 60%: not reached",
        "embed-1B: 50% of the time at work: 90% gemm",
        "train-1B: simcse: 50000 tokens/s, 2.50 × padded, goal 2: reached; 0.25 of its memory, goal 0.5: reached",
    ]
    row = alone | {"speedup_over_best": {"median": 2.2}, "refused": None, "latency_s": {"median": 0.004}}
    lines = said(tmp_path, "embed-1B", [row], shape="1B", best_peer="sentence-transformers")
    assert "embed-1B: one text of 12 tokens: 4 ms" in lines
    assert "embed-1B: 2.20 × sentence-transformers, goal 2: reached" in lines
