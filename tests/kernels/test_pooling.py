import pytest
import torch

from bivec.kernels.pooling import POOLING_MODES, pool

LENGTHS = [1, 5, 64, 65, 3]


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def expected(hidden, lengths, starts, mode, weight, eps, dim, normalize):
    """float64, one sequence at a time."""
    vectors = []
    for rows, start in zip(hidden.double().split(lengths), starts, strict=True):
        if weight is not None:
            rows = rows / (rows.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()
        rows = rows[start:]
        if mode == "mean":
            vector = rows.mean(0)
        elif mode == "weighted_mean":
            weights = torch.arange(1, len(rows) + 1, dtype=torch.float64)[:, None]
            vector = (rows * weights).sum(0) / weights.sum()
        else:
            vector = rows[-1 if mode == "last" else 0]
        vector = vector[:dim]
        vectors.append(vector / vector.norm() if normalize else vector)
    return torch.stack(vectors)


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dim", [None, 7])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_equals_float64(mode, norm, dim, normalize, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sum(LENGTHS) + 9, 32, generator=generator).to(dtype)  # nine unused rows
    hidden[sum(LENGTHS) :] = float("nan")
    weight = torch.rand(32, generator=generator) + 0.5 if norm else None
    starts = [0, 2, 10, 64, 1]
    vectors = pool(
        hidden,
        bounds(LENGTHS),
        pool_starts=torch.tensor(starts, dtype=torch.int32),
        mode=mode,
        norm_weight=weight,
        norm_eps=1e-5,
        truncate_dim=dim,
        normalize=normalize,
    )
    truth = expected(hidden[: sum(LENGTHS)], LENGTHS, starts, mode, weight, 1e-5, dim, normalize)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.double(), truth, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_gradients_equal_float64(mode):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sum(LENGTHS), 32, generator=generator)
    weight = torch.rand(32, generator=generator) + 0.5
    upstream = torch.randn(len(LENGTHS), 32, generator=generator)
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    pool(ours[0], bounds(LENGTHS), mode=mode, norm_weight=ours[1]).backward(upstream)
    truth = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    expected(truth[0], LENGTHS, [0] * 5, mode, truth[1], 1e-6, None, True).backward(upstream.double())
    for our, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(our.grad.double(), true.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.ones(4, 3, dtype=torch.int64)}, "hidden must be floating point"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, "cu_seqlens must be int32"),
        ({"pool_starts": torch.tensor([0, 0])}, "pool_starts must be int32"),
        ({"pool_starts": torch.tensor([0, 2], dtype=torch.int32)}, "sequence 1 has none"),
        ({"cu_seqlens": torch.tensor([0, 0, 4], dtype=torch.int32)}, "sequence 0 has none"),
        ({"mode": "max"}, "mode must be one of"),
        ({"norm_weight": torch.ones(4)}, "norm_weight must have shape"),
        ({"truncate_dim": 4}, "truncate_dim must be from 1 to 3"),
    ],
)
def test_bad_input(changes, message):
    arguments = {"hidden": torch.ones(4, 3), "cu_seqlens": torch.tensor([0, 2, 4], dtype=torch.int32)} | changes
    with pytest.raises(ValueError, match=message):
        pool(**arguments)
