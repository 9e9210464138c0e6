"""How fast this processor multiplies a model's matrices in float32 and in bfloat16.

That a processor has bfloat16 instructions does not say that they are fast: where a hypervisor hides AMX, AVX512-BF16
may run at half the rate of float32, and on another processor at twice. So the model's costliest products are timed as a
pass runs them, dtypes in turns, so that what else the machine does slows both, and each at its best of several.

One core does it, as passes side by side have one each: several wait for each other where others compute too, and then
show nothing. A product of a large model is timed in part, which has the rate of the whole to a few percent.
"""

import time
from collections import Counter
from functools import cache

import torch

from .config import ModelConfig
from .cores import on_cores
from .ops import PackedLinear
from .runner import TILES

_DTYPES = (torch.float32, torch.bfloat16)
_PRODUCTS = 2  # of a layer's, the costliest: those of the MLP
_ROUNDS = 6
# elements of the part of a weight that is timed, and its inputs at most: mostly under a millisecond
_WEIGHT, _INPUTS = 2**17, 2048
# what other processes take of the core is not in the thread's own time, which some systems know by the hundredth second
# alone, whatever they say of it
_CLOCKS = (time.thread_time, time.perf_counter)

Shape = tuple[int, int]  # (out, in)


def product_rates(config: ModelConfig) -> tuple[float, float]:
    """GFLOP/s of one core over the model's costliest products in float32 and bfloat16; measured once a process."""
    return _measure(_costliest(config))


def _costliest(config: ModelConfig) -> tuple[tuple[Shape, int], ...]:
    """Shapes of a layer's products, each with how many have it."""
    size, inner = config.hidden_size, config.intermediate_size
    attended = config.num_attention_heads * config.head_dim
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    counts = Counter([(heads, size), (size, attended), (inner, size), (inner, size), (size, inner)])
    return tuple(sorted(counts.items(), key=lambda item: item[0][0] * item[0][1] * item[1])[-_PRODUCTS:])


@cache
@torch.inference_mode()
def _measure(products: tuple[tuple[Shape, int], ...]) -> tuple[float, float]:
    flops = [2 * out * inputs * count for (out, inputs), count in products]  # of one row
    with on_cores(1):
        rates = [_rates(*_part(*shape)) for shape, _ in products]
    float32, bfloat16 = (
        sum(flops) / sum(part / rate for part, rate in zip(flops, of_dtype, strict=True))
        for of_dtype in zip(*rates, strict=True)
    )
    return float32, bfloat16


def _part(out: int, inputs: int) -> Shape:
    inputs = min(inputs, _INPUTS)
    return min(out, _WEIGHT // inputs // 64 * 64), inputs


def _rates(out: int, inputs: int) -> list[float]:
    """GFLOP/s of one product in each of the dtypes."""
    rows = TILES["cpu"][-1]
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(inputs, generator=generator).repeat(count, 1) for count in (rows, out))
    products = [(PackedLinear(weight.to(dtype), None), x.to(dtype)) for dtype in _DTYPES]
    fastest = [[float("inf")] * len(_CLOCKS) for _ in products]
    for _ in range(_ROUNDS):  # the first also compiles
        for place, (product, states) in enumerate(products):
            began = [clock() for clock in _CLOCKS]
            product(states)
            fastest[place] = [
                min(best, clock() - start) for best, clock, start in zip(fastest[place], _CLOCKS, began, strict=True)
            ]
    of_thread, of_wall = zip(*fastest, strict=True)
    return [2e-9 * rows * out * inputs / seconds for seconds in (of_thread if all(of_thread) else of_wall)]
