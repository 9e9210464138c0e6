"""What `attention="auto"` chooses on a GPU: the table of the engine, out of results of the attention benchmark.

    bivec benchmark attention --cases mix --output attention.json
    bivec benchmark fastest-attention attention.json --output table.json
    bivec benchmark fastest-attention attention.json --install

Of each shape it takes the seconds of one forward over lengths as texts to embed have them. What the table says of other
GPUs stays. `engine/fastest.py` says how it is read.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from ..engine.fastest import TABLE, shape_key
from .attention import HEADS

BACKENDS = {"bivec": "triton", "torch varlen": "varlen", "flash-attn varlen": "flash"}


def distill(document: dict) -> tuple[str, dict]:
    """The GPU of a result and its entry in the table.

    Raises:
        ValueError: it is not of the attention benchmark on a GPU, or holds no mix of lengths.
    """
    machine = document["machine"]
    if document["benchmark"] != "attention" or "device_name" not in machine:
        raise ValueError("the results must be of the attention benchmark on a GPU")
    seconds: dict[str, dict[str, float]] = {}
    for row in document["rows"]:
        shape, _, lengths = row["case"].rpartition(", ")
        if lengths != "real mix" or row.get("direction") != "forward" or row["name"] not in BACKENDS:
            continue
        if row["median_s"] is not None:
            num_heads, num_kv_heads, head_dim = HEADS[shape]
            key = shape_key(getattr(torch, row["dtype"]), head_dim, num_heads, num_kv_heads)
            seconds.setdefault(key, {}).setdefault(BACKENDS[row["name"]], row["median_s"])
    # without our own there is nothing to compare with
    seconds = {key: found for key, found in seconds.items() if "triton" in found}
    if not seconds:
        raise ValueError("the results must hold our own forward over a real mix")
    packages = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "triton"))
    return machine["device_name"], {"measured": f"{machine['utc'][:10]}, {packages}", "seconds": seconds}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="of the attention benchmark; a later one of a GPU wins")
    parser.add_argument("--output", type=Path, help="write the table here")
    parser.add_argument("--install", action="store_true", help="write the package's own table")
    arguments = parser.parse_args(argv)
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    for path in arguments.results:
        try:
            gpu, entry = distill(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {error or type(error).__name__}") from error
        table[gpu] = entry
    text = json.dumps(table, indent=2, sort_keys=True) + "\n"
    for target in filter(None, [arguments.output, TABLE if arguments.install else None]):
        target.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
