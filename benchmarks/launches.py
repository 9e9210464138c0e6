"""Which Triton kernels the project launches, and with what: on the CUDA paths, in the benchmarks and in the GPU tests.

Everything runs on the fake device of `fake_cuda.py`, so that the launches are those of the project's own code; a case
that a benchmark gets, or a test, is found here by itself.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from . import attention, attention_peers, contrastive, contrastive_peers, fusions, lora, pooling
from .device_counts import Launch
from .fake_cuda import FakeCuda

CUDA = torch.device("cuda")
REPOSITORY = Path(__file__).resolve().parents[1]
# they need what a fake device has not; their kernels are launched by others
LEFT_OUT = "not opcheck and not compiled and not transformers and not processes and not ranks"
Run = Callable[[], object]


def attention_runs() -> Iterator[tuple[str, Run]]:
    kinds = ["long", "short", "mix", "windows", "dropout"]
    for case in attention.choose_cases(kinds, torch.bfloat16, False):

        def run(case=case) -> None:
            prepared = attention_peers.bivec(case, case.inputs(CUDA))
            for way in attention.directions(prepared).values():
                way()

        yield case.name, run


def contrastive_runs() -> Iterator[tuple[str, Run]]:
    for num_queries, negatives in contrastive.CASES["cuda"]:

        def run(num_queries=num_queries, negatives=negatives) -> None:
            case = contrastive_peers.Contrastive(num_queries, negatives, torch.bfloat16)
            queries, keys = case.inputs(CUDA)
            contrastive.step(queries, keys, contrastive_peers.bivec(case, queries, keys))()

        yield f"{num_queries}:{negatives}", run


def fusions_runs() -> Iterator[tuple[str, Run]]:
    for case in fusions.CASES["cuda"]:
        for name in fusions.OPERATIONS:

            def run(case=case, name=name) -> None:
                operation = fusions.make_operation(name, case, torch.bfloat16, CUDA)
                inputs = [tensor.requires_grad_() for tensor in operation.inputs]
                outputs = fusions.as_tuple(operation.ours(*inputs))
                torch.autograd.grad(outputs, inputs, [torch.empty_like(output) for output in outputs])

            yield f"{case.name}, {name}", run


def lora_runs() -> Iterator[tuple[str, Run]]:
    for case in lora.CASES["cuda"]:

        def run(case=case) -> None:
            layers = lora.Layers(case, 0.05, CUDA, torch.bfloat16)
            x = torch.randn(case.num_tokens, case.in_features, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
            outputs = layers.fused(x)
            torch.autograd.grad(outputs, [x, *layers.adapters], [torch.empty_like(output) for output in outputs])

        yield case.name, run


def pooling_runs() -> Iterator[tuple[str, Run]]:
    for case in pooling.choose_cases(CUDA, False):

        def run(case=case) -> None:
            hidden, weight, upstream = case.inputs(CUDA)
            for way in pooling.directions(pooling.bivec(case, hidden, weight), upstream).values():
                way()

        yield case.label, run


BENCHMARKS = {
    "attention": attention_runs,
    "contrastive": contrastive_runs,
    "fusions": fusions_runs,
    "lora": lora_runs,
    "pooling": pooling_runs,
}


def of_benchmarks(capability: tuple[int, int]) -> Iterator[tuple[str, list[Launch]]]:
    for benchmark, runs in BENCHMARKS.items():
        with FakeCuda(capability) as fake:
            for name, run in runs():
                with fake.section() as section:
                    run()
                yield f"{benchmark} {name}", section.launches


def of_paths(capability: tuple[int, int]) -> Iterator[tuple[str, list[Launch]]]:
    from .cuda_paths import PATHS, exists

    for name, path in PATHS.items():
        if not exists(name, capability):
            continue
        with FakeCuda(capability) as fake:
            path(fake)
        yield name, fake.triton


def of_tests(capability: tuple[int, int]) -> Iterator[tuple[str, list[Launch]]]:
    """Of every test marked `gpu` but those of torch.compile and of other processes; that few pass is no matter."""
    import pytest

    found: list[tuple[str, list[Launch]]] = []

    class Recorder:
        """Gives each test a device of its own and keeps what it launches there."""

        @pytest.hookimpl(hookwrapper=True)
        def pytest_runtest_protocol(self, item):
            with FakeCuda(capability) as fake:
                yield
            found.append((item.nodeid.split("/")[-1], fake.triton))

    options = ["-q", "-q", "--no-header", "--no-summary", "-rN", "-p", "no:cacheprovider", "-m", "gpu", "-k", LEFT_OUT]
    # what the tests ask when they are imported
    with mock.patch.object(torch.cuda, "is_available", return_value=True), contextlib.redirect_stdout(sys.stderr):
        pytest.main([*options, str(REPOSITORY / "tests" / "kernels")], plugins=[Recorder()])
    yield from found


SOURCES: dict[str, Callable[[tuple[int, int]], Iterator[tuple[str, list[Launch]]]]] = {
    "paths": of_paths,
    "benchmarks": of_benchmarks,
    "tests": of_tests,
}
