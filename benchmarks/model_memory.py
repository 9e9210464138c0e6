"""What a dtype's model takes on the CPU: peak memory of loading it and of embedding with it, and seconds to load.

    python -m bivec.benchmarks.model_memory --tokenizer tokenizer.json.gz --output model-memory.json

Every measurement has a process of its own, which has first loaded and run a tiny model, so that what torch,
transformers and bivec take themselves (`before_bytes`) is there before, and no import counts as loading. Peaks are the
kernel's, of all resident memory, mapped files among it; `model_bytes` is the higher peak without `before_bytes`.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bivec import Encoder

from .embed import choose_texts, describe_texts
from .machine import BusyElsewhere, describe_machine, warn_if_disturbed
from .shapes import SHAPES, write_checkpoint
from .texts import synthetic_mix
from .timing import num_rounds, report
from .where_time_goes import dtypes_parser

BASE = "bfloat16"  # what the others are compared with
_CHILD = [
    sys.executable,
    "-c",
    "import json, sys; from bivec.benchmarks.model_memory import measure_one\n"
    "print(json.dumps(measure_one(**json.load(sys.stdin))))",
]


def main(argv: list[str] | None = None) -> int:
    arguments = dtypes_parser(__doc__).parse_args(argv)
    shape = "quick" if arguments.quick else arguments.shape
    num_texts = arguments.num_texts or (24 if arguments.quick else 64)
    mix, texts = choose_texts(arguments.texts, arguments.data, arguments.synthetic, num_texts)
    others = BusyElsewhere()
    with tempfile.TemporaryDirectory() as folder:
        model, tiny = Path(folder, "model"), Path(folder, "tiny")
        write_checkpoint(SHAPES[shape], model, texts, tokenizer=arguments.tokenizer)
        write_checkpoint(SHAPES["quick"], tiny, synthetic_mix(24))
        lengths, _ = describe_texts(str(model), texts, 512)
        rounds = num_rounds(arguments, 3, quick=1)
        rows = [_row(dtype, str(model), str(tiny), texts, max(rounds, 1)) for dtype in arguments.dtypes]
    _compare(rows)
    busy = others.cores()
    facts = {"shape": shape, "mix": mix, "tokens": lengths, "cores_busy_elsewhere": busy}
    report("model_memory", rows, machine=describe_machine(), output=arguments.output, **facts)
    warn_if_disturbed(busy)
    return 0


def _row(dtype: str, model: str, tiny: str, texts: list[str], rounds: int) -> dict:
    """The least of every figure in so many processes: neighbours only ever add."""
    asked = json.dumps({"dtype": dtype, "model": model, "tiny": tiny, "texts": texts})
    found = []
    for _ in range(rounds):
        done = subprocess.run(_CHILD, input=asked, capture_output=True, text=True)
        if done.returncode:
            return {"name": dtype, "skipped": (done.stderr.strip().splitlines() or ["no word"])[-1][:500]}
        found.append(json.loads(done.stdout.splitlines()[-1]))
    row = {key: min(each[key] for each in found) for key in found[0] if key != "dtype"}
    row["model_bytes"] = max(row["load_peak_bytes"], row["run_peak_bytes"]) - row["before_bytes"]
    return {"name": dtype, "dtype": found[0]["dtype"], **row, "skipped": None}


def _compare(rows: list[dict]) -> None:
    """Put beside each what it is of `BASE`."""
    measured = [row for row in rows if not row["skipped"]]
    for base in [row for row in measured if row["name"] == BASE]:
        for row in measured:
            row[f"memory_of_{BASE}"] = row["model_bytes"] / base["model_bytes"]
            row[f"load_seconds_of_{BASE}"] = row["load_s"] / base["load_s"]


def measure_one(dtype: str, model: str, tiny: str, texts: list[str]) -> dict:
    """In a fresh process: seconds of loading, and bytes before it and at its peak, and at the peak of a run."""
    Encoder.from_pretrained(tiny, dtype=dtype, device="cpu").encode(synthetic_mix(4))
    before = _resident("VmRSS")
    _forget_peak()
    start = time.perf_counter()
    encoder = Encoder.from_pretrained(model, dtype=dtype, device="cpu")
    seconds = time.perf_counter() - start
    loading = _resident("VmHWM")
    _forget_peak()
    encoder.encode(texts, show_progress_bar=False)
    return {
        "dtype": encoder.compute_dtype.name,
        "load_s": seconds,
        "before_bytes": before,
        "load_peak_bytes": loading,
        "run_peak_bytes": _resident("VmHWM"),
    }


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # sets the kernel's high-water mark to the present size


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


if __name__ == "__main__":
    sys.exit(main())
