"""Without a GPU the Triton kernels are interpreted, which must be said before anything imports triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
