"""The CPU's cores, which torch computes with through OpenMP's threads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_process: int | None = None  # the one that has OpenMP threads to compute with


def check_cores(computing: bool = False) -> None:
    """Refuse what would give wrong numbers or wait for ever.

    oneDNN divides a product among as many threads as OpenMP says that it has. Parts whose threads OpenMP then does not
    start stay uncomputed, without an error. Threads do not survive a fork, and OpenMP waits for them.

    Args:
        computing: from here on this process has such threads.
    Raises:
        ValueError: the environment lets OpenMP start fewer threads than it says.
        RuntimeError: this process is a fork of one that had threads.
    """
    global _process
    cores = torch.get_num_threads()
    if cores == 1:
        return
    if os.environ.get("OMP_DYNAMIC", "").strip().lower() == "true":
        raise ValueError("OMP_DYNAMIC must be false or unset, got true: with it products come out wrong")
    limit = os.environ.get("OMP_THREAD_LIMIT", "").strip()
    if limit.isdecimal() and int(limit) < cores:
        raise ValueError(
            f"OMP_THREAD_LIMIT must be at least {cores}, the number of threads (OMP_NUM_THREADS), got {limit}"
        )
    if _process not in (None, os.getpid()):
        raise RuntimeError(
            "this process was forked from one that computes with OpenMP's threads, which do not survive a fork: start "
            "it with multiprocessing's spawn method, or call torch.set_num_threads(1) in it"
        )
    if computing:
        _process = os.getpid()


@contextmanager
def on_cores(cores: int) -> Iterator[None]:
    """torch computes with so many cores in this thread."""
    before = torch.get_num_threads()
    if cores != before:
        torch.set_num_threads(cores)
    try:
        yield
    finally:
        if cores != before:
            torch.set_num_threads(before)
