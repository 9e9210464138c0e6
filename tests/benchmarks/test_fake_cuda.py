"""The fake device itself: what it judges, what it counts, and that it leaves nothing behind."""

import threading

import pytest
import torch
import triton
import triton.language as tl

from bivec.benchmarks.device_counts import Counts
from bivec.benchmarks.fake_cuda import FakeCuda


@triton.jit
def _add_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < size), mask=offsets < size)


@triton.jit
def _write_both(ptr, other_ptr, values):
    tl.store(ptr, values)
    tl.atomic_add(other_ptr, values)


@triton.jit
def _many_accesses_kernel(x_ptr, y_ptr, z_ptr, unused_ptr, sum_ptr, size, HAS_Y: tl.constexpr, HAS_Z: tl.constexpr):
    ptrs = x_ptr + tl.arange(0, 16)
    values = tl.load(ptrs)
    if HAS_Y:
        values += tl.load(y_ptr + tl.arange(0, 16))
    for _ in range(size):
        if HAS_Z is False:
            ptrs = z_ptr + tl.arange(0, 16)
    if size > 3:
        _write_both(ptrs, sum_ptr, values)


@torch.library.custom_op("bivec_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x + x


@twice.register_fake
def _(x):
    return torch.empty_like(x)


twice.register_autograd(lambda ctx, grad: twice(grad))


@pytest.fixture
def fake():
    with FakeCuda() as fake:
        yield fake


def host(*shape, pinned=False):
    return torch.ones(shape).pin_memory() if pinned else torch.ones(shape)


def on_device(*shape, **options):
    return torch.empty(shape, device="cuda", **options)


HAZARDS = {
    "item": (lambda: on_device(3).sum().item(), "sync"),
    "float": (lambda: float(on_device()), "sync"),
    "condition": (lambda: bool((on_device(3) > 0).any()), "sync"),
    "tolist": (lambda: on_device(3).tolist(), "sync"),
    "nonzero": (lambda: on_device(3).nonzero(), "sync"),
    "mask": (lambda: on_device(3)[on_device(3) > 0], "sync"),
    "masked assignment": (lambda: on_device(3).__setitem__(on_device(3) > 0, on_device()), "sync"),
    "masked_select": (lambda: on_device(3).masked_select(on_device(3) > 0), "sync"),
    "equal": (lambda: torch.equal(on_device(3), on_device(3)), "sync"),
    "repeats": (lambda: torch.repeat_interleave(on_device(3).long()), "sync"),
    "synchronize": (lambda: torch.cuda.synchronize(), "sync"),
    "event": (lambda: torch.cuda.Event().synchronize(), "sync"),
    "stream": (lambda: torch.cuda.current_stream().synchronize(), "sync"),
    "cpu": (lambda: on_device(3).cpu(), "copy to host"),
    "to cpu": (lambda: on_device(3).to("cpu"), "copy to host"),
    "into pageable memory": (lambda: host(3).copy_(on_device(3), non_blocking=True), "copy to host"),
    "blocking into pinned memory": (lambda: host(3, pinned=True).copy_(on_device(3)), "copy to host"),
    "pageable": (lambda: host(3).to("cuda", non_blocking=True), "pageable copy"),
    "pinned but blocking": (lambda: host(3, pinned=True).to("cuda"), "pageable copy"),
    "list": (lambda: torch.tensor([1, 2], device="cuda"), "pageable copy"),
    "into the device": (lambda: on_device(3).copy_(host(3)), "pageable copy"),
    "index on the host": (lambda: on_device(3)[torch.tensor([0, 1])], "pageable copy"),
}
HARMLESS = {
    "pinned": lambda: host(3, pinned=True).to("cuda", non_blocking=True),
    "made pinned": lambda: torch.empty(3, pin_memory=True).to("cuda:0", non_blocking=True),
    "to pinned": lambda: torch.empty(3, pin_memory=True).copy_(on_device(3), non_blocking=True),
    "part of pinned": lambda: on_device(2).copy_(host(3, pinned=True)[1:], non_blocking=True),
    "number": lambda: on_device(3) * 2 + host(1)[0],
    "views": lambda: on_device(4, 3)[1:, None].transpose(0, 1).flatten()[:, None].expand(-1, 5),
    "assignment": lambda: on_device(4, 3)[:, 1].fill_(3.0),
    "where it is": lambda: on_device(3).to("cuda"),
}


@pytest.mark.parametrize("name", HAZARDS)
def test_what_the_host_waits_for_is_found(fake, name):
    run, kind = HAZARDS[name]
    run()
    assert [hazard.kind for hazard in fake.hazards] == [kind]
    assert fake.hazards[0].place.startswith("tests/benchmarks/test_fake_cuda.py:")


@pytest.mark.parametrize("name", HARMLESS)
def test_what_it_does_not_wait_for_is_no_hazard(fake, name):
    HARMLESS[name]()
    assert fake.hazards == []


@pytest.mark.parametrize("name", [*HAZARDS, "pinned"])
def test_a_capture_survives_none_of_it(fake, name):
    run = HARMLESS[name] if name in HARMLESS else HAZARDS[name][0]
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        run()
    assert "in a capture" in {hazard.kind for hazard in fake.hazards}


def test_tensors_of_two_devices_are_refused(fake):
    with pytest.raises(RuntimeError, match="same device"):
        on_device(3) + host(3)
    with pytest.raises(ValueError, match="x_ptr"):
        _add_kernel[(1,)](host(3), on_device(3), 3, BLOCK=4)
    with pytest.raises(TypeError, match="numpy"):
        on_device(3).numpy()


def test_operators_are_counted_by_what_they_launch(fake):
    a, b = on_device(4, 8, dtype=torch.bfloat16), on_device(8, 2, dtype=torch.bfloat16)
    c = on_device(4, 2)
    table, places = on_device(1000, 8), on_device(5, dtype=torch.int64)
    for run, expected in [
        (lambda: a.view(-1)[3:].reshape(29, 1).expand(29, 4), Counts()),
        (lambda: torch.empty_like(a), Counts()),
        (lambda: on_device(0, 8) + 1, Counts()),
        (lambda: a @ b, Counts(kernels=1, bytes=2 * (32 + 16 + 8))),
        (lambda: torch.mm(a, b, out=on_device(4, 2, dtype=torch.bfloat16)), Counts(kernels=1, bytes=2 * (32 + 16 + 8))),
        (lambda: on_device(4, 2, dtype=torch.bfloat16).addmm_(a, b), Counts(kernels=1, bytes=2 * (32 + 16 + 8 + 8))),
        (lambda: torch.add(a, 1, out=a), Counts(kernels=1, bytes=2 * 2 * 32)),
        (lambda: torch.ops.aten.addmm.dtype_out(c, a, b, torch.float32, out=c), Counts(kernels=1, bytes=96 + 2 * 32)),
        (lambda: a.add_(a[:1].expand(4, 8)), Counts(kernels=1, bytes=2 * (32 + 8 + 32))),
        (lambda: torch.zeros(3, device="cuda"), Counts(fills=1, bytes=12)),
        (lambda: a.zero_(), Counts(fills=1, bytes=64)),
        (lambda: a.clone(), Counts(copies=1, bytes=128)),
        (lambda: a.float(), Counts(kernels=1, bytes=64 + 128)),
        (lambda: host(3, pinned=True).to("cuda", non_blocking=True), Counts(copies=1, bytes=12)),
        (lambda: table.index_select(0, places), Counts(kernels=1, bytes=2 * 5 * 8 * 4 + 5 * 8)),
        (lambda: torch._foreach_add_([a, b], 1), Counts(kernels=1, bytes=2 * 2 * (32 + 16))),
    ]:
        with fake.section() as section:
            run()
        assert section.counts == expected, section.operators
    assert fake.counts.launches == 13


def test_a_triton_launch_is_noted_as_given(fake):
    x = on_device(100)
    _add_kernel[lambda meta: (triton.cdiv(99, meta["BLOCK"]),)](
        x[1:], y_ptr=on_device(100), size=99, BLOCK=32, num_warps=2
    )
    _add_kernel[(0,)](x, x, 0, BLOCK=32)
    (launch,) = fake.triton
    assert (launch.kernel, launch.grid, launch.options) == (_add_kernel, (4,), {"num_warps": 2})
    assert list(launch.arguments) == ["x_ptr", "y_ptr", "size", "BLOCK"]
    tensor = launch.arguments["x_ptr"]
    assert (tensor.shape, tensor.dtype, tensor.storage_offset()) == ((99,), torch.float32, 1)
    assert (tensor.data_ptr() % 16, launch.arguments["y_ptr"].data_ptr() % 512) == (4, 0)
    assert fake.counts == Counts(kernels=1, triton=1, bytes=4 * (99 + 100))
    with pytest.raises(TypeError, match="BLOCK"):
        _add_kernel[(1,)](x, x, 0)


@pytest.mark.parametrize(
    ("constants", "loaded", "stored"),
    [
        ({"HAS_Y": False, "HAS_Z": True}, {"x_ptr", "sum_ptr"}, {"x_ptr", "sum_ptr"}),
        ({"HAS_Y": True, "HAS_Z": False}, {"x_ptr", "y_ptr", "sum_ptr"}, {"x_ptr", "z_ptr", "sum_ptr"}),
    ],
)
def test_a_kernel_reads_what_it_loads_and_writes_what_it_stores(fake, constants, loaded, stored):
    sizes = {"x_ptr": 16, "y_ptr": 32, "z_ptr": 64, "unused_ptr": 128, "sum_ptr": 256}
    _many_accesses_kernel[(1,)](**{name: on_device(size) for name, size in sizes.items()}, size=3, **constants)
    assert fake.counts.bytes == 4 * sum(sizes[name] for names in (loaded, stored) for name in names)


def test_custom_operators_run_their_own_bodies_and_gradients(fake):
    x = on_device(3, requires_grad=True)
    y = twice(x)
    assert fake.total.operators == {"add": 1}
    y.backward(torch.ones_like(y))
    assert fake.total.operators == {"add": 2, "ones_like": 1}
    assert x.grad.is_cuda
    assert x.grad.device == torch.device("cuda", 0)


def test_a_module_moves_with_its_tied_parameters_and_trains(fake):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model.to("cuda")
    assert model[1].weight is model[0].weight
    assert isinstance(model[0].weight, torch.nn.Parameter)
    assert model[0].weight.is_cuda
    optimizer = torch.optim.AdamW(model.parameters())
    model(on_device(2, 4)).sum().backward()
    with fake.section() as section:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert section.hazards == []
    assert "_foreach_addcdiv_" in section.operators  # all parameters at once, as on the device


def test_autocast_multiplies_in_its_dtype_and_casts_a_weight_once(fake):
    linear = torch.nn.Linear(4, 4, bias=False, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        outputs = [linear(on_device(2, 4)) for _ in range(3)]
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    assert fake.total.operators["copy_ into another dtype"] == 4
    assert linear(on_device(2, 4)).dtype == torch.float32


def test_a_graph_has_what_was_captured_and_counts_as_one_launch(fake):
    graph, x = torch.cuda.CUDAGraph(), on_device(8)
    with torch.cuda.graph(graph):
        x.add_(1)
        _add_kernel[(1,)](x, x, 8, BLOCK=8)
    assert graph.counts == Counts(kernels=2, triton=1, bytes=4 * 32)
    assert fake.counts == Counts()
    assert len(fake.triton) == 1
    graph.replay()
    assert (fake.counts.replays, fake.counts.launches) == (1, 1)


def test_another_thread_copies_too(fake):
    found = []
    thread = threading.Thread(target=lambda: found.append(host(3).to("cuda") + 1))
    thread.start()
    thread.join()
    assert found[0].is_cuda
    assert [hazard.kind for hazard in fake.hazards] == ["pageable copy"]
    assert fake.counts.launches == 2


def test_nothing_is_left_behind():
    names = {owner: dict(vars(owner)) for owner in (torch.cuda, torch.Tensor, torch._C, torch)}
    with FakeCuda():
        x = on_device(3)
    for owner, before in names.items():
        assert dict(vars(owner)) == before
    with pytest.raises(RuntimeError, match="outside"):
        x + 1
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            on_device(3)
    with FakeCuda(capability=(8, 0)):
        assert torch.cuda.get_device_capability() == (8, 0)
        with pytest.raises(RuntimeError, match="active"), FakeCuda():
            pass
        assert on_device(3).is_cuda
