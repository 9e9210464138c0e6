"""The breakdown sees the work of every thread, and tells it apart."""

import threading

import pytest
import torch

from bivec.benchmarks.breakdown import breakdown


def test_work_in_another_thread_is_seen():
    x = torch.randn(600, 600)

    def run():
        thread = threading.Thread(target=lambda: [x @ x for _ in range(20)])
        thread.start()
        thread.join()
        torch.relu(x)

    found = breakdown(run, torch.device("cpu"))
    shares = {part["name"]: part["share"] for part in found["parts"]}
    assert next(iter(shares)) == "aten::mm"
    assert shares["aten::mm"] > 0.5 > shares["aten::clamp_min"] > 0
    assert next(part["calls"] for part in found["parts"] if part["name"] == "aten::mm") == 20
    assert found["work_s"] > 0
    assert found["wall_s"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_are_the_parts_on_cuda():
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    found = breakdown(lambda: [x @ x for _ in range(20)], torch.device("cuda"))
    assert found["parts"][0]["calls"] == 20
    assert found["parts"][0]["share"] > 0.9
    assert found["work_s"] < found["wall_s"]
