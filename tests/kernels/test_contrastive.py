"""contrastive_loss against float64: every term and gradient, with the kernel and in eager PyTorch; refusals."""

import inspect
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

from bivec.kernels import contrastive, reference
from bivec.kernels.contrastive import chunks as contrastive_chunks
from bivec.kernels.contrastive import contrastive_loss, pooled_contrastive_loss
from bivec.kernels.contrastive import eager as contrastive_eager
from bivec.kernels.contrastive import small as contrastive_small
from bivec.kernels.pooling import pool

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NUM_QUERIES, NUM_KEYS, WIDTH = 37, 101, 24  # multiples of no block, even after the hard negatives


@pytest.fixture(params=["small", "chunks", "eager"])
def place(request, device):
    """The device, with the two launches of a small batch, the chunks of a large one, and what runs without Triton."""

    def runs_kernel(_):  # which torch.compile looks into
        return request.param != "eager"

    with (
        mock.patch.object(contrastive, "runs_kernel", runs_kernel),
        mock.patch.object(contrastive_small, "SMALL_SCORES", 2**20 if request.param == "small" else 0),
    ):
        yield device


def example(device, dtype=torch.float32, num_queries=NUM_QUERIES, num_keys=NUM_KEYS):
    """Queries near their permuted positives among hard negatives; targets and groups."""
    generator = torch.Generator().manual_seed(num_queries + num_keys)
    keys = torch.randn(num_keys, WIDTH, generator=generator)
    targets = torch.randperm(num_keys, generator=generator)[:num_queries]
    queries = keys[targets] + 2 * torch.randn(num_queries, WIDTH, generator=generator)
    groups = torch.randint(0, num_keys // 5 + 1, (num_keys,), generator=generator)
    return queries.to(device, dtype), keys.to(device, dtype), targets.to(device), groups.to(device)


def loss_and_gradients(function, inputs, upstream, wanted=(0, 1, 2), **settings):
    """Loss and the wanted gradients of (queries, keys, temperature)."""
    inputs = [tensor.detach().clone().requires_grad_(index in wanted) for index, tensor in enumerate(inputs)]
    queries, keys, temperature = inputs
    loss = function(queries, keys, temperature=temperature, **settings)
    return [loss.detach(), *torch.autograd.grad(loss, [inputs[index] for index in wanted], upstream.to(loss.dtype))]


CASES = {
    "diagonal": {},
    "targets": {"targets": True},
    "groups": {"targets": True, "groups": True},
    "symmetric": {"symmetric": True},
    "symmetric groups": {"targets": True, "groups": True, "symmetric": True},
    "dims": {"targets": True, "dims": (5, 8, WIDTH)},
    "dims symmetric groups": {"targets": True, "groups": True, "symmetric": True, "dims": [7, 16]},
    "not normalised": {"normalize": False, "targets": True},
}


def settings_of(case, targets, groups):
    settings = dict(CASES[case])
    for name, tensor in (("targets", targets), ("groups", groups)):
        if settings.pop(name, False):
            settings[name] = tensor
    return settings


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("case", list(CASES))
def test_loss_and_gradients(place, case, dtype):
    queries, keys, targets, groups = example(place, DTYPES[dtype])
    settings = settings_of(case, targets, groups)
    temperature = 0.5 if case == "not normalised" else 0.07
    inputs = (queries, keys, torch.tensor(temperature, device=place))
    upstream = torch.tensor(1.7, device=place)
    computed = loss_and_gradients(contrastive_loss, inputs, upstream, **settings)
    eager = loss_and_gradients(reference.contrastive_loss, inputs, upstream, **settings)
    exact = [tensor.double() for tensor in inputs]
    truth = loss_and_gradients(reference.contrastive_loss, exact, upstream, **settings)
    for name, ours, theirs, true, dtype_expected in zip(
        ("loss", "queries", "keys", "temperature"),
        computed,
        eager,
        truth,
        (torch.float32, DTYPES[dtype], DTYPES[dtype], torch.float32),
        strict=True,
    ):
        assert ours.dtype == dtype_expected
        error, baseline = (ours.double() - true).abs().max(), (theirs.double() - true).abs().max()
        # sums over a hundred keys in another order: a few steps of the dtype
        step = 8 * torch.finfo(ours.dtype).eps * true.abs().max()
        # in a scalar the baseline's own errors may cancel: a quarter of a step of the unit vectors' products
        score_step = torch.finfo(queries.dtype).eps / temperature / 4
        step += {"loss": score_step, "temperature": score_step / temperature}.get(name, 0.0)
        assert error <= 2 * baseline + step, name


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_each_gradient_alone_is_the_same(place, wanted):
    queries, keys, targets, _ = example(place)
    inputs = (queries, keys, torch.tensor(0.07, device=place))
    upstream = torch.tensor(-0.3, device=place)
    loss, *together = loss_and_gradients(contrastive_loss, inputs, upstream, targets=targets)
    alone = loss_and_gradients(contrastive_loss, inputs, upstream, wanted=wanted, targets=targets)
    assert torch.equal(alone[0], loss)
    for gradient, index in zip(alone[1:], wanted, strict=True):
        assert torch.equal(gradient, together[index])
    with torch.no_grad():
        assert torch.equal(contrastive_loss(*inputs[:2], targets=targets, temperature=inputs[2]), loss)


def test_temperature_as_number_and_as_tensor(place):
    queries, keys, *_ = example(place)
    number = contrastive_loss(queries, keys, temperature=0.125)
    for dtype in (torch.float32, torch.float16):
        temperature = torch.tensor([0.125], dtype=dtype, device=place, requires_grad=True)
        loss = contrastive_loss(queries, keys, temperature=temperature)
        assert torch.equal(loss, number)
        loss.backward()
        assert temperature.grad.dtype == dtype
        assert temperature.grad.shape == (1,)


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (64, 64), (130, 259)])
def test_shapes(place, shape):
    queries, keys, targets, groups = example(place, num_queries=shape[0], num_keys=shape[1])
    settings = {"targets": targets, "groups": groups, "symmetric": True}
    inputs, upstream = (queries, keys, torch.tensor(0.05, device=place)), torch.tensor(1.0, device=place)
    computed = loss_and_gradients(contrastive_loss, inputs, upstream, **settings)
    truth = loss_and_gradients(reference.contrastive_loss, [x.double() for x in inputs], upstream, **settings)
    for ours, true in zip(computed, truth, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)


def test_chunks_change_rounding_alone_and_a_second_run_nothing(place):
    queries, keys, targets, groups = example(place, num_queries=150, num_keys=160)
    settings = {"targets": targets, "groups": groups, "symmetric": True}
    inputs, upstream = (queries, keys, torch.tensor(0.07, device=place)), torch.tensor(0.6, device=place)
    whole = loss_and_gradients(contrastive_loss, inputs, upstream, **settings)
    with (
        mock.patch.object(contrastive_eager, "LOGITS_BYTES", 1),
        mock.patch.object(contrastive_chunks, "MATRIX_BYTES", 1),
    ):
        assert contrastive_eager.chunk_rows(150, 160) == 64
        assert contrastive_chunks.chunk_rows(150, 160, torch.float32, 32) == 32
        chunks = loss_and_gradients(contrastive_loss, inputs, upstream, **settings)
    again = loss_and_gradients(contrastive_loss, inputs, upstream, **settings)
    for one, many, second in zip(whole, chunks, again, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-6)
        assert torch.equal(one, second)


def test_chunks_hold_a_few_thousand_rows_at_most_in_memory():
    for num_keys in (1, 1000, 65536, 2**22):
        rows = contrastive_eager.chunk_rows(10**6, num_keys)
        assert rows >= 64
        assert rows * num_keys * 4 <= max(contrastive_eager.LOGITS_BYTES, 64 * 4 * num_keys)
        for dtype in DTYPES.values():
            rows = contrastive_chunks.chunk_rows(10**6, num_keys, dtype, 128)
            assert 128 <= rows <= contrastive_chunks.LARGEST_CHUNK
            assert rows % 128 == 0
            size = rows * num_keys * dtype.itemsize
            assert size <= max(contrastive_chunks.MATRIX_BYTES, 128 * dtype.itemsize * num_keys)


def test_one_group_masks_every_negative(place):
    """Nothing is left but the positives: a loss of zero, gradients of zero."""
    queries, keys, targets, groups = example(place)
    inputs, upstream = (queries, keys, torch.tensor(0.07, device=place)), torch.tensor(1.0, device=place)
    for symmetric in (False, True):
        computed = loss_and_gradients(
            contrastive_loss, inputs, upstream, targets=targets, groups=torch.zeros_like(groups), symmetric=symmetric
        )
        for tensor in computed:
            assert tensor.abs().max() < 1e-5


def test_small_gradients_survive_float16(place):
    """Probabilities of 1e-7 are zero in float16, and so are their products with 1 / N; a loss scale needs them."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(3, WIDTH, generator=generator).half().to(place)
    keys = torch.cat([queries, torch.randn(4, WIDTH, generator=generator).half().to(place)])
    inputs = (queries, keys, torch.tensor(0.07, device=place))
    upstream = torch.tensor(2.0**16, device=place)
    computed = loss_and_gradients(contrastive_loss, inputs, upstream)
    truth = loss_and_gradients(reference.contrastive_loss, [x.double() for x in inputs], upstream)
    assert computed[1].any()
    for ours, true in zip(computed[1:3], truth[1:3], strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=0.02, atol=0.02 * true.abs().max().item())


def test_strided_inputs(place):
    queries, keys, targets, _ = example(place)
    expected = contrastive_loss(queries, keys, targets=targets)
    transposed = contrastive_loss(queries.T.contiguous().T, keys.repeat(1, 2)[:, :WIDTH], targets=targets)
    torch.testing.assert_close(transposed, expected, rtol=1e-6, atol=1e-6)


def test_pooled(place, gradients):
    lengths = [3, 1, 7, 2, 5, 4, 9]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sum(lengths), WIDTH, generator=generator).to(place)
    weight = (torch.rand(WIDTH, generator=generator) + 0.5).to(place)
    cu_seqlens = torch.tensor([0, *lengths], device=place).cumsum(0).int()
    starts = torch.tensor([1, 0, 2, 1, 0, 0, 0], dtype=torch.int32, device=place)
    targets = torch.tensor([2, 0, 3], device=place)
    upstream = torch.tensor(1.3, device=place)
    pooling = {"pool_starts": starts, "mode": "weighted_mean", "norm_eps": 1e-5}

    def ours(hidden, weight):
        return pooled_contrastive_loss(
            hidden, cu_seqlens, num_queries=3, norm_weight=weight, targets=targets, symmetric=True, **pooling
        )

    def separately(hidden, weight):
        vectors = pool(hidden, cu_seqlens, norm_weight=weight, normalize=False, **pooling)
        return reference.contrastive_loss(vectors[:3], vectors[3:], targets=targets, symmetric=True)

    for one, other in zip(
        gradients(ours, [hidden, weight], upstream), gradients(separately, [hidden, weight], upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_padding_is_nobodys_negative(place, symmetric):
    """Keys of group -1 change neither the loss nor a gradient, and get none."""
    queries, keys, targets, groups = example(place)
    padding = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
    padding[targets] = False
    padding &= groups % 2 == 0
    assert padding.any()
    new_place = (~padding).cumsum(0) - 1
    expected = contrastive_loss(
        queries, keys[~padding], targets=new_place[targets], groups=groups[~padding], symmetric=symmetric
    )
    keys.requires_grad_()
    loss = contrastive_loss(queries, keys, targets=targets, groups=groups.masked_fill(padding, -1), symmetric=symmetric)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert keys.grad[padding].abs().max() == 0
    assert keys.grad[~padding].abs().max() > 0


@pytest.mark.parametrize("num_queries", [0, 3, 2.0])
def test_pooled_needs_queries_and_keys(num_queries):
    cu_seqlens = torch.tensor([0, 2, 3, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"num_queries must be from 1 to 2.* got {num_queries}"):
        pooled_contrastive_loss(torch.ones(4, WIDTH), cu_seqlens, num_queries=num_queries)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_opcheck(place, dtype):
    queries, keys, targets, groups = example(place, DTYPES[dtype])
    temperature = torch.tensor(0.07, device=place, requires_grad=True)
    queries.requires_grad_()
    keys.requires_grad_()
    arguments = (queries.detach(), keys.detach(), targets, groups, temperature.detach(), True)
    torch.library.opcheck(contrastive._log_sum_exps, arguments)
    column_lse, row_lse = contrastive._log_sum_exps(*arguments)
    for last in (
        (None, None, temperature, 0.0, True, False, True),
        (column_lse, row_lse, None, 0.07, True, True, True),
    ):
        torch.library.opcheck(contrastive._contrastive_forward, (queries, keys, targets, groups, *last))
    torch.library.opcheck(
        contrastive.scale_gradients, ([queries.detach(), keys.detach()], temperature.detach(), DTYPES[dtype])
    )


def test_no_graph_break_when_compiled(place):
    queries, keys, targets, groups = example(place)
    inputs = [tensor.requires_grad_() for tensor in (queries, keys)]

    def step(queries, keys):
        return contrastive_loss(queries * 2, keys, targets=targets, groups=groups, symmetric=True, dims=(8, 24)) + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")
    expected = torch.autograd.grad(step(*inputs), inputs)
    for ours, theirs in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_no_synchronisation():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    queries, keys, targets, groups = example("cuda", torch.bfloat16, 3000, 5001)
    inputs, upstream = (queries, keys, torch.tensor(0.07, device="cuda")), torch.tensor(1.0, device="cuda")
    settings = {"targets": targets, "groups": groups, "symmetric": True, "dims": (16, 24)}
    loss_and_gradients(contrastive_loss, inputs, upstream, **settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradients(contrastive_loss, inputs, upstream, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")


RANK_BEGINS = """
import os, sys, torch, torch.distributed as dist
from bivec.kernels.contrastive import contrastive_loss
rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
"""

RANK_ENDS = """
dist.destroy_process_group()
os._exit(0)  # gloo's threads may still drop Python objects, which aborts an interpreter that is being torn down
"""

RANK = """
results = []
for settings in torch.load(f"{folder}/cases.pt"):
    rows = [settings.pop(name).chunk(world_size)[rank] for name in ("queries", "keys")]
    queries, keys = (tensor.clone().requires_grad_() for tensor in rows)
    for name in ("targets", "groups"):
        if name in settings:
            settings[name] = settings[name].chunk(world_size)[rank]
    temperature = torch.tensor(0.07, requires_grad=True)
    loss = contrastive_loss(queries, keys, temperature=temperature, process_group=dist.group.WORLD, **settings)
    results.append([loss.detach(), *torch.autograd.grad(loss, [queries, keys, temperature], torch.tensor(1.4))])
torch.save(results, f"{folder}/rank{rank}.pt")
"""


def run_ranks(script, world_size, folder):
    """`script` in as many processes of a group, each of which knows `rank`, `world_size` and their `folder`."""
    whole = RANK_BEGINS + script + RANK_ENDS
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", whole, str(rank), str(world_size), str(folder)], env=environment)
        for rank in range(world_size)
    ]
    try:
        for rank in ranks:
            assert rank.wait(timeout=120) == 0
    finally:
        for rank in ranks:
            rank.kill()


def test_two_processes_equal_one_on_the_joined_batch(device, tmp_path):
    if device != "cpu":
        pytest.skip("gloo runs on the CPU")
    world_size, each, keys_each = 2, 13, 29
    generator = torch.Generator().manual_seed(5)
    local = torch.stack([torch.randperm(keys_each, generator=generator)[:each] for _ in range(world_size)])
    targets = local + keys_each * torch.arange(world_size)[:, None]
    groups = torch.randint(0, 9, (world_size * keys_each,), generator=generator)
    cases = []
    for dtype in (torch.float32, torch.float16):
        queries = torch.randn(world_size * each, WIDTH, generator=generator).to(dtype)
        keys = torch.randn(world_size * keys_each, WIDTH, generator=generator).to(dtype)
        rows = {"queries": queries, "keys": keys}
        cases += [
            rows | {"targets": local.flatten()},
            rows | {"targets": local.flatten(), "groups": groups, "symmetric": True, "dims": [8, WIDTH]},
        ]
    cases.append({**cases[0], "groups": groups})
    del cases[0]["targets"]  # the diagonal, which is each rank's own
    torch.save(cases, tmp_path / "cases.pt")
    run_ranks(RANK, world_size, tmp_path)
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world_size)]
    diagonal = torch.arange(each) + keys_each * torch.arange(world_size)[:, None]
    for number, settings in enumerate(cases):
        inputs = (settings.pop("queries"), settings.pop("keys"), torch.tensor(0.07))
        settings["targets"] = targets.flatten() if "targets" in settings else diagonal.flatten()
        joined = loss_and_gradients(contrastive_loss, inputs, torch.tensor(1.4), **settings)
        losses, grad_queries, grad_keys, grad_temperature = zip(*(rank[number] for rank in results), strict=True)
        tolerance = {"rtol": 0, "atol": 4 * torch.finfo(inputs[0].dtype).eps}
        torch.testing.assert_close(torch.stack(losses).mean(), joined[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.cat(grad_queries) / world_size, joined[1], **tolerance)
        torch.testing.assert_close(torch.cat(grad_keys) / world_size, joined[2], **tolerance)
        torch.testing.assert_close(torch.stack(grad_temperature).mean(), joined[3], rtol=1e-5, atol=1e-5)


UNEQUAL_RANK = """
messages = []
# queries, keys, embedding size, groups: of each rank
for shapes in [((3, 5, 8, 0), (3, 6, 8, 0)), ((3, 5, 8, 0), (2, 5, 8, 0)), ((3, 5, 8, 5), (3, 5, 8, 0))]:
    num_queries, num_keys, size, num_groups = shapes[rank]
    rows = torch.ones(num_queries, size), torch.ones(num_keys, size)
    groups = torch.zeros(num_groups, dtype=torch.int64) if num_groups else None
    try:
        contrastive_loss(*rows, groups=groups, process_group=dist.group.WORLD)
        messages.append("")
    except ValueError as error:
        messages.append(str(error))
torch.save(messages, f"{folder}/rank{rank}.pt")
"""


def test_unequal_ranks_are_refused_on_every_rank(device, tmp_path):
    if device != "cpu":
        pytest.skip("gloo runs on the CPU")
    run_ranks(UNEQUAL_RANK, 2, tmp_path)
    came = ("[[3, 5, 32], [3, 6, 32]]", "[[3, 5, 32], [2, 5, 32]]", "[[3, 5, 40], [3, 5, 32]]")
    for rank in range(2):
        for message, shapes in zip(torch.load(tmp_path / f"rank{rank}.pt"), came, strict=True):
            assert "must have the same shapes and dtypes on every rank of process_group, got " in message
            assert message.endswith(shapes)


PEAK = """
import sys, torch
from bivec.benchmarks.timing import _peak_memory
from bivec.kernels.contrastive import contrastive_loss
torch.manual_seed(0)
def step(number):
    queries, keys = (torch.randn(number, 32, requires_grad=True) for _ in range(2))
    contrastive_loss(queries, keys).backward()
step(64)
print(_peak_memory(lambda: step(int(sys.argv[1])), torch.device("cpu"))[0])
"""


def test_memory_is_linear(device):
    """At 16,384 queries a float32 matrix of scores is 1 GiB: the peak is below a fifth, at most 4 × that of 4,096."""
    if device != "cpu":
        pytest.skip("the CPU's path")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    peaks = []
    for number in ("4096", "16384"):
        command = [sys.executable, "-c", PEAK, number]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
        if output == "None":
            pytest.skip("the peak cannot be measured here")
        peaks.append(int(output))
    assert peaks[1] < 2**30 / 5
    assert peaks[1] < 4 * peaks[0]


def changed(name, value):
    queries, keys, targets, groups = example("cpu", num_queries=4, num_keys=6)
    arguments = {"queries": queries, "keys": keys, "targets": targets, "groups": groups}
    arguments[name] = value(arguments.get(name))
    return arguments


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "queries",
            lambda q: q[:0],
            r"queries must be \(num_queries, embedding_size\), both at least 1, got float32 \(0",
        ),
        ("queries", lambda q: q[0], r"queries must be \(num_queries, embedding_size\), .*got float32 \(24,\)"),
        ("queries", lambda q: q.double(), "queries must be bfloat16, float16 or float32, got float64"),
        ("keys", lambda k: k[:, 1:], r"keys must be \(num_keys, 24\) like queries, got float32 \(6, 23\)"),
        ("keys", lambda k: k[:0], r"keys must be \(num_keys, 24\) like queries, got float32 \(0, 24\)"),
        ("keys", lambda k: k.half(), r"keys must have queries' dtype float32 \(4, 24\), got float16 \(6, 24\)"),
        ("keys", lambda k: k.to("meta"), "keys must be on queries' device cpu, got meta"),
        ("targets", lambda t: t.int(), r"targets must be int64 of shape \(4,\), got int32 \(4,\)"),
        ("targets", lambda t: t[1:], r"targets must be int64 of shape \(4,\), got int64 \(3,\)"),
        ("targets", lambda t: t.to("meta"), "targets must be on queries' device cpu, got meta"),
        ("targets", lambda t: t * 0 + 6, "targets must be from 0 to 5, got one outside"),
        ("targets", lambda t: t - 6, "targets must be from 0 to 5, got one outside"),
        ("groups", lambda g: g.int(), r"groups must be int64 of shape \(6,\), got int32 \(6,\)"),
        ("groups", lambda g: g[1:], r"groups must be int64 of shape \(6,\), got int64 \(5,\)"),
        ("groups", lambda g: g.to("meta"), "groups must be on queries' device cpu, got meta"),
        ("groups", lambda g: g - 9, "groups must be at least 0, or -1 for padding, got one below"),
        ("temperature", lambda _: 0, "temperature must be finite and above 0, got 0"),
        ("temperature", lambda _: -0.1, "temperature must be finite and above 0, got -0.1"),
        ("temperature", lambda _: float("nan"), "temperature must be finite and above 0, got nan"),
        ("temperature", lambda _: "0.1", "temperature must be a number or a tensor of one element, got '0.1'"),
        ("temperature", lambda _: torch.zeros(1), "temperature must be above 0, got a tensor that is not"),
        ("temperature", lambda _: torch.ones(2), r"temperature must be one floating-point element, got float32 \(2,\)"),
        ("temperature", lambda _: torch.tensor(1), r"temperature must be one floating-point element, got int64 \(\)"),
        (
            "temperature",
            lambda _: torch.ones((), device="meta"),
            "temperature must be on queries' device cpu, got meta",
        ),
        ("dims", lambda _: (), r"dims must be one or more sizes from 1 to 24, got \(\)"),
        ("dims", lambda _: (8, 25), r"dims must be one or more sizes from 1 to 24, got \(8, 25\)"),
        ("dims", lambda _: [0], r"dims must be one or more sizes from 1 to 24, got \[0\]"),
        ("dims", lambda _: 8, "dims must be one or more sizes from 1 to 24, got 8"),
    ],
)
def test_refusals_name_the_argument_the_requirement_and_what_came(name, value, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**changed(name, value))


def test_symmetric_refuses_repeated_targets():
    arguments = changed("targets", lambda _: torch.tensor([0, 3, 1, 3]))
    contrastive_loss(**arguments)
    with pytest.raises(ValueError, match="targets must be unique when symmetric, got one twice"):
        contrastive_loss(**arguments, symmetric=True)


def test_the_diagonal_needs_a_key_for_every_query():
    with pytest.raises(ValueError, match="keys must have 4 rows or more unless targets are given, got 3"):
        contrastive_loss(torch.ones(4, 2), torch.ones(3, 2))


def test_reference_and_loss_share_their_signature():
    assert inspect.signature(contrastive_loss) == inspect.signature(reference.contrastive_loss)
