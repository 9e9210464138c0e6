"""How much memory is free."""

import os
from pathlib import Path

import torch


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that are free, or taken by what can be read again; on the CPU half of all where the system does not say."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
