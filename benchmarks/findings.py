"""What a folder of results says, a line each, beside the goals: what is reached, who is ahead, what is wrong.

A line names the figure, the goal where there is one, and the best of the peers of the same run.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

# TFLOP/s of attention at head dimension 128 and 4,096 tokens
ATTENTION_GOALS = {"forward": 450.0, "backward": 350.0}
CONTRASTIVE_SECONDS, CONTRASTIVE_BYTES = 0.033, 1.5e9  # 65,536 rows of 768
LORA_RELATIVE = 1.15
EMBED_SHARES = {"1B": 0.60, "8B": 0.65}  # of the measured rate of the linears
EMBED_SPEEDUP, TRAIN_SPEEDUP = 2.0, 2.0
OURS = "bivec"

Rows = list[dict]


def findings(folder: Path) -> list[str]:
    """One line a finding, of every result in the folder that there is something to say of."""
    lines: list[str] = []
    kinds = list(_KINDS)
    known = [path for path in sorted(folder.glob("*.json")) if _kind(path) in kinds]
    for path in sorted(known, key=lambda path: kinds.index(_kind(path))):
        document = json.loads(path.read_text(encoding="utf-8"))
        rows = document.get("rows", [])
        lines += [f"{path.stem}: {line}" for line in _KINDS[_kind(path)](document, rows)]
        lines += [f"{path.stem}: {line}" for line in _not_measured(rows)]
        left_out = document.get("left_out", {})
        if left_out:
            lines.append(f"{path.stem}: {len(left_out)} cases left out: {next(iter(left_out.values()))}")
        if "SYNTHETIC" in str(document.get("mix", "")):
            lines.append(f"{path.stem}: the texts are made up, not a real mix: give --data")
    return lines


def _kind(path: Path) -> str:
    return path.stem.partition("-")[0]


def _reached(figure: float, goal: float, more_is_better: bool = True) -> str:
    return "reached" if (figure >= goal if more_is_better else figure <= goal) else "not reached"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _median(value) -> float | None:
    return value["median"] if isinstance(value, dict) else value


def _groups(rows: Rows, keys: Iterable[str]) -> dict[tuple, dict[str, dict]]:
    """Rows by the given keys, and then by name."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if "name" in row and all(key in row for key in keys):
            found.setdefault(tuple(row[key] for key in keys), {})[row["name"]] = row
    return found


def _fastest_peer(group: dict[str, dict]) -> dict | None:
    ran = [row for name, row in group.items() if not name.startswith(OURS) and row.get("median_s")]
    return min(ran, key=lambda row: row["median_s"], default=None)


def _beside(ours: dict, peer: dict | None) -> str:
    """How the fastest peer did."""
    if peer is None:
        return "no peer ran"
    ratio = peer["median_s"] / ours["median_s"]
    return f"{ratio:.2f} × {peer['name']}"


def _not_measured(rows: Rows) -> list[str]:
    """Whatever of ours was refused, failed or is wrong, each reason once."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.get("skipped") and (row["name"].startswith(OURS) or row["name"] == "all"):
            place = row.get("case") or row.get("stage") or row.get("operation") or f"{row.get('num_queries', '')} rows"
            reasons.setdefault(row["skipped"], []).append(str(place))
    return [f"NOT MEASURED, {reason} ({', '.join(dict.fromkeys(places))})" for reason, places in reasons.items()]


def _smoke(document: dict, rows: Rows) -> list[str]:
    right = sum(bool(row.get("right")) for row in rows)
    return [f"{right} of {len(rows)} checks right"]


def _attention(document: dict, rows: Rows) -> list[str]:
    lines = []
    for (case, direction), group in _groups(rows, ("case", "direction")).items():
        ours = group.get(OURS)
        if ours is None or not ours.get("median_s"):
            continue
        if ours["p90"] <= 256:
            figure = f"{ours['gb_per_s']:.0f} GB/s, {ours['of_copy']:.0%} of the copy rate"
        else:
            figure = f"{ours['tflops']:.0f} TFLOP/s"
        goal = ATTENTION_GOALS.get(direction) if case.startswith("D128") and case.endswith("uniform 4096") else None
        if goal:
            figure += f", goal {goal:.0f}: {_reached(ours['tflops'], goal)}"
        lines.append(f"{case}, {direction}: {figure}; {_beside(ours, _fastest_peer(group))}")
    return lines


def _contrastive(document: dict, rows: Rows) -> list[str]:
    lines = []
    for (queries, keys), group in _groups(rows, ("num_queries", "num_keys")).items():
        ours = group.get(OURS)
        if ours is None or not ours.get("median_s"):
            continue
        figure = _milliseconds(ours["median_s"])
        if queries == keys == 65536:
            seconds, peak = ours["median_s"], ours["peak_growth_bytes"]
            figure += f", goal {CONTRASTIVE_SECONDS * 1e3:.0f} ms: {_reached(seconds, CONTRASTIVE_SECONDS, False)}"
            if peak is not None:
                figure += f"; {peak / 1e9:.2f} GB, goal 1.5: {_reached(peak, CONTRASTIVE_BYTES, False)}"
        graphed = group.get(f"{OURS}, CUDA graph", {}).get("median_s")
        if graphed:
            figure += f" ({_milliseconds(graphed)} as a graph)"
        lines.append(f"{queries} × {keys}: {figure}; {_beside(ours, _fastest_peer(group))}")
    for case, spent in document.get("breakdowns", {}).items():
        parts = ", ".join(f"{part['share']:.0%} {part['name'][:40]}" for part in spent["parts"][:4])
        lines.append(f"{case}, time: {parts}")
    return lines


def _fusions(document: dict, rows: Rows) -> list[str]:
    lines = []
    for (operation, case, dtype), group in _groups(rows, ("operation", "case", "dtype")).items():
        ours = group.get(OURS)
        if ours is None or not ours.get("median_s"):
            continue
        share = f", {ours['of_copy']:.0%} of the copy rate" if ours.get("of_copy") else ""
        beside = _beside(ours, _fastest_peer(group))
        lines.append(f"{operation}, {case}, {dtype}: {_milliseconds(ours['median_s'])}{share}; {beside}")
    return lines


def _pooling(document: dict, rows: Rows) -> list[str]:
    lines = []
    for (case, size, norm, direction), group in _groups(rows, ("case", "size", "norm", "direction")).items():
        ours = group.get(OURS)
        if ours is not None and ours.get("median_s"):
            label = f"{case}, {size}, {'with' if norm else 'no'} norm, {direction}"
            lines.append(f"{label}: {ours['of_copy']:.0%} of the copy rate; {_beside(ours, _fastest_peer(group))}")
    return lines


def _lora(document: dict, rows: Rows) -> list[str]:
    lines = []
    for row in rows:
        relative = _median(row.get("relative"))
        if row["name"].startswith(OURS) and relative is not None:
            reached = _reached(relative, LORA_RELATIVE, more_is_better=False)
            label = f"{row['case']}, {row['dtype']}, {row['name'].removeprefix(OURS).strip(', ') or 'no dropout'}"
            lines.append(f"{label}: {relative:.2f} × the frozen linear, goal {LORA_RELATIVE}: {reached}")
    return lines


def _tiles(document: dict, rows: Rows) -> list[str]:
    dropped: dict[tuple, list[int]] = {}
    for row in rows:
        if "rows" in row:
            found = dropped.setdefault((row["shape"], row["setting"]), [])
            found += [] if row["agrees"] else [row["rows"]]
    return [
        f"{shape}, {setting}: "
        + (f"tiles of {', '.join(map(str, numbers))} rows dropped" if numbers else "all tiles agree")
        for (shape, setting), numbers in dropped.items()
    ]


def _float8(document: dict, rows: Rows) -> list[str]:
    lines = []
    for row in rows:
        speedup = _median(row.get("speedup"))
        if row["name"] == "bfloat16" or not row.get("median_s"):
            continue
        if row["case"] == "products" and speedup is not None:
            agrees = "" if row["agrees"] else ", other bits than the largest tile"
            figure = f"{row['tflops']:.0f} TFLOP/s, {speedup:.2f} × bfloat16, error {row['error']:.1e}{agrees}"
            lines.append(f"{row['shape']}, {row['rows']} rows, {row['name']}: {figure}")
        elif row["case"] == "kernels":
            lines.append(f"{row['shape']}, {row['name']}: {row['of_copy']:.0%} of a copy's rate")
        elif row["case"] == "encoding" and speedup is not None:
            figure = f"{speedup:.2f} × bfloat16, least cosine to it {row['least_cosine']:.4f}, tiles {row['tiles']}"
            lines.append(f"{row['shape']}, encoding: {figure}")
    return lines


def _embed(document: dict, rows: Rows) -> list[str]:
    lines = []
    ours = next((row for row in rows if row.get("name", "").startswith(OURS) and row.get("tokens_per_s")), None)
    alone = document.get("alone") or {}
    share = (ours or alone).get("share_of_linears")
    tokens = (ours or alone).get("tokens_per_s")
    if tokens:
        goal = EMBED_SHARES.get(document.get("shape", ""))
        reached = f", goal {goal:.0%}: {_reached(share, goal)}" if goal and share else ""
        lines.append(f"{tokens:.0f} tokens/s, {share or 0:.0%} of the linears' own rate{reached}")
    latency = _median((ours or alone).get("latency_s"))
    if latency:
        lines.append(f"one text of 12 tokens: {_milliseconds(latency)}")
    speedup = _median((ours or {}).get("speedup_over_best"))
    if speedup:
        reached = _reached(speedup, EMBED_SPEEDUP)
        lines.append(f"{speedup:.2f} × {document.get('best_peer')}, goal {EMBED_SPEEDUP:.0f}: {reached}")
    if ours and ours.get("refused"):
        lines.append(f"NO SPEED-UP, {ours['refused']}")
    spent = document.get("breakdown_of_bivec") or {}
    if spent.get("parts"):
        parts = ", ".join(f"{part['share']:.0%} {part['name'][:40]}" for part in spent["parts"][:5])
        lines.append(f"{spent['work_s'] / spent['wall_s']:.0%} of the time at work: {parts}")
    return lines


def _train(document: dict, rows: Rows) -> list[str]:
    lines = []
    for (stage,), group in _groups(rows, ("stage",)).items():
        ours, peer = group.get(OURS), _fastest_peer(group)
        if ours is None or not ours.get("median_s"):
            continue
        line = f"{stage}: {ours['tokens_per_s']:.0f} tokens/s, {_beside(ours, peer)}"
        if peer is not None:
            reached = _reached(peer["median_s"] / ours["median_s"], TRAIN_SPEEDUP)
            line += f", goal {TRAIN_SPEEDUP:.0f}: {reached}"
            if ours.get("peak_growth_bytes") and peer.get("peak_growth_bytes"):
                share = ours["peak_growth_bytes"] / peer["peak_growth_bytes"]
                line += f"; {share:.2f} of its memory, goal 0.5: {_reached(share, 0.5, False)}"
        lines.append(line)
    return lines


def _job(document: dict, rows: Rows) -> list[str]:
    if "durable_share" not in document:
        return []
    durable, unused = document["durable_share"], document["unused_rows"]
    return [
        f"{durable:.1%} for durability, goal 2 %: {_reached(durable, 0.02, False)}; "
        f"{unused:.1%} unused rows, goal 5 %: {_reached(unused, 0.05, False)}"
    ]


def _tune(document: dict, rows: Rows) -> list[str]:
    return [f"{len(rows)} variants measured"]


# in the order in which a person would ask
_KINDS: dict[str, Callable[[dict, Rows], list[str]]] = {
    "smoke": _smoke,
    "attention": _attention,
    "contrastive": _contrastive,
    "fusions": _fusions,
    "lora": _lora,
    "pooling": _pooling,
    "tiles": _tiles,
    "float8": _float8,
    "embed": _embed,
    "train": _train,
    "job": _job,
    "tune": _tune,
}
