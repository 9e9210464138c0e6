"""Is a sequence's attention bitwise the same alone and in company, on one core and on several? Tried at each load.

torch divides sequences, heads and blocks of queries among the cores. Each core has working memory of its own, aligned
in its own way, and a single block leaves the cores to its products, so that their number may show. Heads are divided as
sequences are: the first few, where they stand, stand for all.
"""

from collections.abc import Collection, Sequence
from contextlib import nullcontext

import torch

from ..kernels.attention import batched
from . import ops
from .config import ModelConfig, Window
from .cores import on_cores
from .packing import PackedBatch

# of sequences that attention is tried on: all up to 64, and some whose blocks torch makes larger
_LENGTHS = (*range(1, 65), 65, 100, 193, 415, 520)


@torch.inference_mode()
def differing_lengths(
    config: ModelConfig,
    windows: Sequence[Window],
    dtype: torch.dtype,
    several: Sequence[int],
    *,
    in_batches: bool,
    but: Collection[int] = (),
) -> tuple[set[int], set[int]]:
    """Lengths whose attention has other bits in company than alone, and on `several` numbers of cores than on one.

    Args:
        windows: that passes run with.
        dtype: of the heads.
        in_batches: whether to try the lengths that `batched_attention` takes, by it, or all by torch's own.
        but: lengths that are not tried.
    """
    heads_a_group = config.num_attention_heads // config.num_key_value_heads
    num_groups = min(config.num_key_value_heads, 2 if heads_a_group == 1 else 1)
    num_heads = num_groups * heads_a_group  # one alone only where the model has one
    many = max(3, max(several, default=1) // num_heads + 2)  # so that every core has a part
    lengths = [length for length in _LENGTHS if length <= config.max_position_embeddings and length not in but]
    counts = {length: many if length <= 64 else 3 for length in lengths}  # long sequences are divided further
    if in_batches:
        companies = [[length for length in lengths if length in batched.LENGTHS for _ in range(counts[length])]]
    else:
        companies = [[length] * counts[length] for length in lengths]
    num_rows = max(map(sum, companies), default=0)
    shape = (num_rows, config.num_attention_heads + 2 * config.num_key_value_heads, config.head_dim)
    heads = torch.rand(shape, generator=torch.Generator().manual_seed(0)).mul_(4).sub_(2).to(dtype)

    def attend(rows: torch.Tensor, company: Sequence[int], window: Window) -> torch.Tensor:
        query, key, value = rows.tensor_split(
            [config.num_attention_heads, config.num_attention_heads + config.num_key_value_heads], dim=1
        )
        batch = PackedBatch.from_sequences([[0] * length for length in company])
        parts = batched.plan_batches(company, num_groups) if in_batches else []
        used = query[:, :num_heads], key[:, :num_groups], value[:, :num_groups]
        out = torch.empty(used[0].shape, dtype=dtype)
        return ops.attention(*used, batch, window, "sdpa", out=out, parts=parts)

    in_company: set[int] = set()
    on_several: set[int] = set()
    for company in companies:
        rows = heads[: sum(company)]
        parts = rows.split(company)
        for window in {_within(max(company, default=1), window) for window in windows}:
            with on_cores(1) if several else nullcontext():
                together = attend(rows, company, window).split(company)
                # each at the beginning of memory of its own
                alone = [attend(part.clone(), [len(part)], window) for part in parts]
            in_company |= _differing(alone, together)
            lasts = dict(zip(company, zip(parts, alone, strict=True), strict=True))  # one of each length
            for cores in several:
                with on_cores(cores):
                    on_several |= _differing(attend(rows, company, window).split(company), together)
                    again = [attend(part, [length], window) for length, (part, _) in lasts.items()]
                on_several |= _differing(again, [expected for _, expected in lasts.values()])
    return in_company, on_several


def _differing(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> set[int]:
    """The lengths of sequences whose rows differ."""
    return {len(a) for a, b in zip(first, second, strict=True) if not torch.equal(a, b)}


def _within(length: int, window: Window) -> Window:
    """The same window over so many tokens, in one spelling."""
    left, right = (length - 1 if side < 0 else min(side, length - 1) for side in window)
    return left, right
