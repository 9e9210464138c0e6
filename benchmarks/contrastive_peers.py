"""Everybody who computes the contrastive loss: ours, eager, compiled, tiled as Inf-CL, as a vocabulary's cross-entropy,
sentence-transformers.

A peer prepares itself from a case and its leaves and returns a function that computes the loss anew, or the reason why
it cannot run. `N` queries, `M` keys, `E` embedding size; keys beyond N are hard negatives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels import reference
from ..kernels.contrastive import contrastive_loss

TEMPERATURE = 0.05
EAGER_BYTES = {"cpu": 8 * 2**30, "cuda": 64 * 2**30}  # scores that a version with the whole matrix may hold
TILE = {"cpu": 1024, "cuda": 8192}
MINI_BATCH = 1024  # of sentence-transformers' cached loss: its default of 32 is for models, not for embeddings


@dataclass(frozen=True)
class Contrastive:
    """One case: so many queries, as many positives, and `negatives` hard negatives for each."""

    num_queries: int
    negatives: int
    dtype: torch.dtype
    size: int = 768

    @property
    def name(self) -> str:
        return f"{self.num_queries} queries, {self.num_keys} keys"

    def num_bytes(self, device: torch.device) -> float:
        """An estimate: rows and gradients in float64 and for each peer, and pieces of the truth; peers check theirs."""
        pieces = 4 * 8 * 1024 * self.num_keys if device.type == "cuda" else 0
        return 60.0 * (self.num_queries + self.num_keys) * self.size + pieces

    @property
    def num_keys(self) -> int:
        return self.num_queries * (1 + self.negatives)

    @property
    def flops(self) -> float:
        """The three products that forward and backward need at least."""
        return 6.0 * self.num_queries * self.num_keys * self.size

    @property
    def eager_bytes(self) -> int:
        """Four matrices in float32: scores, masked or scaled, probabilities, their gradient."""
        return 16 * self.num_queries * self.num_keys

    def inputs(self, device: torch.device) -> list[Tensor]:
        """Queries and keys, each query near its positive."""
        generator = torch.Generator(device).manual_seed(0)
        keys = torch.randn(self.num_keys, self.size, generator=generator, device=device)
        noise = torch.randn(self.num_queries, self.size, generator=generator, device=device)
        queries = keys[: self.num_queries] + 4 * noise
        return [rows.to(self.dtype).requires_grad_() for rows in (queries, keys)]


Loss = Callable[[], Tensor]
Peer = Callable[[Contrastive, Tensor, Tensor], Loss | str]


def bivec(case: Contrastive, queries: Tensor, keys: Tensor) -> Loss:
    return lambda: contrastive_loss(queries, keys, temperature=TEMPERATURE)


def eager(case: Contrastive, queries: Tensor, keys: Tensor) -> Loss | str:
    if case.eager_bytes > EAGER_BYTES[queries.device.type]:
        return f"its scores would take {case.eager_bytes / 2**30:.0f} GiB"
    return lambda: reference.contrastive_loss(queries, keys, temperature=TEMPERATURE)


def compiled(case: Contrastive, queries: Tensor, keys: Tensor) -> Loss | str:
    if case.eager_bytes > EAGER_BYTES[queries.device.type]:
        return f"its scores would take {case.eager_bytes / 2**30:.0f} GiB"
    function = torch.compile(reference.contrastive_loss)
    # compiling is no part of the first call's memory; two sizes, so that the compiled code takes any
    for count in (case.num_queries // 4, case.num_queries // 2):
        number = count * (1 + case.negatives)
        function(queries[:count], keys[:number], temperature=TEMPERATURE).backward()
    return lambda: function(queries, keys, temperature=TEMPERATURE)


class _TiledLogSumExp(torch.autograd.Function):
    """Each query's log-sum-exp of its scores with all keys, tile by tile, whose backward computes the tiles again."""

    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor, tile: int) -> Tensor:
        lse = queries.new_full((queries.shape[0],), -torch.inf, dtype=torch.float32)
        for rows, lse_rows in zip(queries.split(tile), lse.split(tile), strict=True):
            for columns in keys.split(tile):
                torch.logaddexp(lse_rows, (rows @ columns.T).float().logsumexp(1), out=lse_rows)
        ctx.save_for_backward(queries, keys, lse)
        ctx.tile = tile
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_lse: Tensor):
        queries, keys, lse = ctx.saved_tensors
        grad_queries, grad_keys = (torch.zeros(rows.shape, device=rows.device) for rows in (queries, keys))
        for start in range(0, queries.shape[0], ctx.tile):
            chunk = slice(start, start + ctx.tile)
            for begin in range(0, keys.shape[0], ctx.tile):
                columns = slice(begin, begin + ctx.tile)
                scores = (queries[chunk] @ keys[columns].T).float()
                gradient = scores.sub_(lse[chunk, None]).exp_().mul_(grad_lse[chunk, None]).to(queries.dtype)
                grad_queries[chunk] += gradient @ keys[columns]
                grad_keys[columns] += gradient.T @ queries[chunk]
        return grad_queries.to(queries.dtype), grad_keys.to(keys.dtype), None


def inf_cl(case: Contrastive, queries: Tensor, keys: Tensor) -> Loss:
    """Cheng et al., arXiv 2410.17243, on one device and in plain PyTorch."""
    tile = TILE[queries.device.type]

    def loss() -> Tensor:
        scaled, unit_keys = F.normalize(queries, dim=1) / TEMPERATURE, F.normalize(keys, dim=1)
        positive = (scaled * unit_keys[: case.num_queries]).sum(1, dtype=torch.float32)
        return (_TiledLogSumExp.apply(scaled, unit_keys, tile) - positive).mean()

    return loss


def torch_linear_cross_entropy(case: Contrastive, queries: Tensor, keys: Tensor) -> Loss | str:
    """torch's chunked loss of a language model's head, the keys its vocabulary."""
    options = getattr(nn, "LinearCrossEntropyOptions", None)
    if options is None:
        return "torch.nn.functional.linear_cross_entropy is not in this torch"
    targets = torch.arange(case.num_queries, device=queries.device)

    def loss() -> Tensor:
        scaled, unit_keys = F.normalize(queries, dim=1) / TEMPERATURE, F.normalize(keys, dim=1)
        return F.linear_cross_entropy(scaled, unit_keys, targets, options=options())

    return loss


def liger(case: Contrastive, queries: Tensor, keys: Tensor) -> Loss | str:
    """Liger has no contrastive loss: its fused linear cross-entropy with the keys as the vocabulary."""
    if not queries.is_cuda:
        return "Liger's kernels need a GPU"
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return "package liger-kernel is not installed"
    targets = torch.arange(case.num_queries, device=queries.device)

    def loss() -> Tensor:
        scaled, unit_keys = F.normalize(queries, dim=1) / TEMPERATURE, F.normalize(keys, dim=1)
        return liger_fused_linear_cross_entropy(scaled, unit_keys, targets)

    return loss


class _ReadyEmbeddings(nn.Sequential):
    """The model of a loss that is given embeddings."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["embeddings"]}


def sentence_transformers(case: Contrastive, queries: Tensor, keys: Tensor, cached: bool) -> Loss | str:
    try:
        from sentence_transformers.sentence_transformer import losses
    except ImportError:
        return "package sentence-transformers (6) is not installed"
    if not cached and case.eager_bytes > EAGER_BYTES[queries.device.type]:
        return f"its scores would take {case.eager_bytes / 2**30:.0f} GiB"
    model, scale = _ReadyEmbeddings(), 1 / TEMPERATURE
    if cached:
        function = losses.CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=MINI_BATCH)
    else:
        function = losses.MultipleNegativesRankingLoss(model, scale=scale)
    labels = torch.empty(0)

    def loss() -> Tensor:
        return function([{"embeddings": rows} for rows in (queries, *keys.split(case.num_queries))], labels)

    return loss


PEERS: dict[str, Peer] = {
    "bivec": bivec,
    "eager": eager,
    "eager, torch.compile": compiled,
    "Inf-CL, plain PyTorch": inf_cl,
    "torch linear_cross_entropy": torch_linear_cross_entropy,
    "Liger fused linear cross-entropy": liger,
    "MultipleNegativesRankingLoss": partial(sentence_transformers, cached=False),
    "CachedMultipleNegativesRankingLoss": partial(sentence_transformers, cached=True),
}
