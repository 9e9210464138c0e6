"""What the optimizer does beside its arithmetic."""

import torch
from torch import nn

from bivec.training.optimizer import Optimizer


def test_what_is_restored_counts_as_written(make_settings, tmp_path):
    """LoRA linears on a GPU take an adapter over when torch has counted a write to it."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = Optimizer({"a": parameter}, make_settings("simcse", output=str(tmp_path / "run")))
    before = parameter._version
    optimizer.restore({"parameter.a": torch.ones(3)}, optimizer.schedule_state())
    assert parameter.detach().tolist() == [1.0, 1.0, 1.0]
    assert parameter._version > before
