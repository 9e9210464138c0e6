"""Which attention is fastest on this GPU for this model, as `bivec benchmark attention` measured it there.

The choice depends on model, dtype and device alone, so that it is the same for every batch. The table holds the seconds
of each backend's forward over lengths as texts to embed have them; `bivec benchmark fastest-attention` writes it. On a
GPU that is not in it, and everywhere while there is no such file, it is bivec's own kernel.

    {"NVIDIA H200": {"measured": "2026-12-01", "seconds": {"bfloat16 D64 grouped": {"triton": 1e-4, "varlen": 2e-4}}}}
"""

import json
import logging
from pathlib import Path

import torch

from . import ops
from .config import ModelConfig
from .packing import PackedBatch

logger = logging.getLogger(__name__)

TABLE = Path(__file__).parent / "fastest_attention.json"
# of our own seconds at most: only our own passes are captured, and attention is a few percent of a pass
_WORTH = 0.67
_LENGTHS = (1, 2, 7, 16, 33, 63, 64, 65, 127, 128, 129, 200, 256, 300, 512, 1000)


def shape_key(dtype: torch.dtype, head_dim: int, num_heads: int, num_key_value_heads: int) -> str:
    """The table's name of a shape."""
    heads = "grouped" if num_heads > num_key_value_heads else "ungrouped"
    return f"{str(dtype).removeprefix('torch.')} D{head_dim} {heads}"


def fastest_backend(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend for embedding where none is asked for, and why; why is empty on the CPU."""
    own = ops.choose_backend("auto", device, dtype, config.head_dim)
    if device.type == "cpu":
        return own, ""
    if own != "triton":
        return own, f"bivec's kernel takes no heads of {config.head_dim}"
    gpu = torch.cuda.get_device_name(device)
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    entry = table.get(gpu, {"seconds": {}})
    key = shape_key(dtype, config.head_dim, config.num_attention_heads, config.num_key_value_heads)
    seconds = entry["seconds"].get(key)
    if seconds is None:
        return own, f"no other was measured for {key} on {gpu}"
    for name in sorted(seconds, key=seconds.get):
        if seconds[name] > _WORTH * seconds[own]:
            break
        try:
            ops.choose_backend(name, device, dtype, config.head_dim)
        except ValueError as error:
            logger.info("attention %r was measured to be faster, but: %s", name, error)
            continue
        differs = differs_in_company(name, config, device, dtype)
        if differs:
            logger.warning("attention %r was measured to be faster, but: %s", name, differs)
            continue
        times = seconds[own] / seconds[name]
        return name, f"measured {times:.1f} times as fast as bivec's for {key} on {gpu}, {entry['measured']}"
    return own, f"measured for {key} on {gpu}, {entry['measured']}: no other is worth it"


@torch.inference_mode()
def differs_in_company(backend: str, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """What the sequences beside one change of its attention's bits, or nothing."""
    lengths = [length for length in _LENGTHS if length <= config.max_position_embeddings]
    sequences = [[0] * length for length in lengths]
    num_heads, num_groups = config.num_attention_heads, config.num_key_value_heads
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(sum(lengths), num_heads + 2 * num_groups, config.head_dim, generator=generator)
    heads = heads.to(device, dtype)

    def attend(rows: torch.Tensor, batch: list[list[int]], window: tuple[int, int]) -> torch.Tensor:
        query, key, value = rows.tensor_split([num_heads, num_heads + num_groups], dim=1)
        return ops.attention(query, key, value, PackedBatch.from_sequences(batch, device=device), window, backend)

    for window in sorted(set(config.bidirectional_windows)):
        together = attend(heads, sequences, window).split(lengths)
        for rows, sequence, expected in zip(heads.split(lengths), sequences, together, strict=True):
            if not torch.equal(attend(rows, [sequence], window), expected):
                return f"over {len(sequence)} tokens it has other bits in company than alone"
    return ""
