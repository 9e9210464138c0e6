"""What the kernels become on a GPU, read without one: registers, spills, shared memory, tensor-core instructions.

    python -m bivec.benchmarks.compiled_kernels --capability 90 --head-dim 64 128 --dtype bfloat16
    python -m bivec.benchmarks.compiled_kernels --operation contrastive --dtype bfloat16
    python -m bivec.benchmarks.compiled_kernels --operation pooling --hidden-size 2048
    python -m bivec.benchmarks.compiled_kernels --operation lora
    python -m bivec.benchmarks.compiled_kernels --operation fusions --size 576 4096

The launchers run on small CPU tensors while Triton believes in a device of the capability asked for, and every launch
is compiled instead of run. So what is read is specialised exactly as on that device. The last line is one JSON
document; TRITON_INTERPRET must not be set.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ..kernels.attention import operator as attention
from ..kernels.attention import tiles as attention_tiles
from ..kernels.contrastive import contrastive_loss
from ..kernels.cross_entropy import kernel as cross_entropy
from ..kernels.lora import kernels as lora
from ..kernels.lora import room_behind
from ..kernels.norm import kernels as norm
from ..kernels.pooling import sums as pooling_sums
from ..kernels.rotary import kernel as rotary
from ..kernels.swiglu import kernels as swiglu
from . import sass
from .fake_cuda import FakeCuda

MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_left": 128, "window_right": 0},
    "dropout": {"dropout_p": 0.1},
    "annealed": {"future_p": 0.5},
}
RANDOM_MASKS = ("dropout", "annealed")
TERMS = ("plain", "groups", "all")  # of the contrastive loss: groups as well, and both directions


class _AbsentDevice:
    """The part of Triton's driver that compiling asks: which device is this?"""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@contextmanager
def collected_launches(capability: int) -> Iterator[list]:
    """Compile instead of launching, for a device of this capability; yields the list of compiled kernels."""
    launches: list = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        launches.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    before = driver._active
    driver.set_active(_AbsentDevice(capability))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield launches
    finally:
        driver._active = before


def compile_attention(capability: int, head_dim: int, dtype: torch.dtype, mask: str) -> dict:
    """Kernel name -> resources of every kernel that attention with this mask launches, forward and backward."""
    group_size = 4
    q, out, grad_out, grad_q = (torch.empty(256, 2 * group_size, head_dim, dtype=dtype) for _ in range(4))
    k, v, grad_k, grad_v = (torch.empty(256, 2, head_dim, dtype=dtype) for _ in range(4))
    lse, delta = (torch.empty(2 * group_size, 256) for _ in range(2))
    cu_seqlens = torch.zeros(5, dtype=torch.int32)
    settings: dict[str, Any] = {
        "window_left": -1,
        "window_right": -1,
        "dropout_p": 0.0,
        "future_p": 1.0,
        "future_p_tensor": None,
    }
    settings |= {"seeds": torch.zeros(4, dtype=torch.int64) if mask in RANDOM_MASKS else None} | MASKS[mask]
    attention_mask = attention.AttentionMask(**settings)
    block_d = attention_tiles.padded_head_dim(head_dim)
    tiles = attention_tiles.tiles_for(block_d, dtype, divmod(capability, 10), attention_mask)
    tile_list = torch.zeros(8, 4, dtype=torch.int32)
    last = (0.125, attention_mask, tiles)
    with collected_launches(capability) as launches:
        attention.attention_forward_long(q, k, v, out, lse, 4, tile_list, *last)
        attention.attention_forward_short(q, k, v, out, lse, cu_seqlens, *last)
        attention.attention_backward_long(
            q, k, v, out, lse, grad_out, grad_q, grad_k, grad_v, delta, 4, tile_list, *last
        )
        attention.attention_backward_short(q, k, v, grad_out, grad_q, grad_k, grad_v, cu_seqlens, *last)
    return {kernel.metadata.name.strip("_"): resources(kernel) for kernel in launches}


def compile_pooling(capability: int, size: int, dtype: torch.dtype, norm: str) -> dict:
    """Kernel name -> resources of the pooling kernels for hidden states of `size`, forward and backward.

    `norm` of the hidden states: `none`, or `rms`.
    """
    hidden, sums = torch.empty(256, size, dtype=dtype), torch.empty(4, size)
    cu_seqlens, pool_starts = torch.zeros(5, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    eps = 1e-6 if norm == "rms" else None
    with collected_launches(capability) as launches:
        pooling_sums.pool_sums(hidden, cu_seqlens, pool_starts, 0, eps)
        pooling_sums.pool_sums_backward(sums, hidden, cu_seqlens, pool_starts, 0, eps)
    return {kernel.metadata.name.strip("_"): resources(kernel) for kernel in launches}


def compile_contrastive(capability: int, num_keys: int, dtype: torch.dtype, terms: str) -> dict:
    """Kernel name -> resources of what a contrastive loss launches: `plain`, of `groups`, or of `all` terms.

    101 keys are a small batch, of which nothing is a multiple of 16; 65,536 go through the chunks.
    """
    with FakeCuda(divmod(capability, 10)) as fake:
        num_queries = min(num_keys, 256)
        queries, keys = (
            torch.empty(number, 768, dtype=dtype, device="cuda", requires_grad=True)
            for number in (num_queries, num_keys)
        )
        groups = None if terms == "plain" else torch.empty(num_keys, dtype=torch.int64, device="cuda")
        contrastive_loss(queries, keys, groups=groups, symmetric=terms == "all").backward()
    found: dict = {}
    with collected_launches(capability) as compiled:
        for launch in fake.triton:
            launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments, **launch.options)
            found[compiled[-1].hash] = compiled[-1]
    rows: dict = {}
    for kernel in found.values():
        name = kernel.metadata.name.strip("_")
        earlier = sum(other.startswith(name) for other in rows)
        rows[f"{name} {earlier + 1}" if earlier else name] = resources(kernel)
    return rows


def compile_lora(capability: int, size: int, dtype: torch.dtype, adapters: str) -> dict:
    """Kernel name -> resources of the LoRA linears' passes under dropout: q, k and v of rank 16, that train `alone` or
    over `frozen` ones."""
    ranks = [16] * (6 if adapters == "frozen" else 3)
    num_columns = sum(ranks)
    x = torch.empty(256, size + room_behind(size, ranks), dtype=dtype)[:, :size]
    low = x.as_strided((256, num_columns), x.stride(), size)
    a = torch.empty(num_columns, x.stride(0), dtype=dtype)[:, :size]
    with collected_launches(capability) as launches:
        bits = lora.low_rank(x, a, low, 48, 1000, 2**62, 1.05)
        lora.add_grad_x(torch.empty(256, size, dtype=dtype), low.contiguous(), a, bits, 48, 1.05)
        lora.grad_a(x, low.contiguous(), bits, 48, 1.05)
    return {kernel.metadata.name.strip("_"): resources(kernel) for kernel in launches}


def compile_fusions(capability: int, size: int, dtype: torch.dtype, pass_: str) -> dict:
    """Kernel name -> resources of norm, rotary, SwiGLU and cross-entropy at a hidden size, `forward` or `backward`."""
    x, weight, rstd, losses = (
        torch.empty(256, size, dtype=dtype),
        torch.empty(size, dtype=dtype),
        torch.empty(256, 1),
        torch.empty(256),
    )
    heads, tables = x.view(256, -1, 64), (torch.empty(256, 32), torch.empty(256, 32))
    logits, targets = torch.empty(256, 49152, dtype=dtype), torch.zeros(256).long()
    with collected_launches(capability) as launches:
        if pass_ == "forward":
            norm.norm_forward(x, x, weight, 1e-6)
            rotary.rotate(heads, heads, *tables, False)
            swiglu.swiglu_forward(x, x)
            cross_entropy.differentiate_rows(logits, targets, losses, 1.0, True)
        else:
            norm.norm_backward(x, x, x, weight, rstd, True)
            rotary.rotate(heads, heads, *tables, True)
            swiglu.swiglu_backward(x, x, x)
    return {kernel.metadata.name.strip("_"): resources(kernel) for kernel in launches}


def configurations(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[..., dict], tuple]]:
    """What tells a configuration from the others, what compiles it, and its arguments after the capability."""
    compile_operation: Callable[[int, int, torch.dtype, str], dict]
    if arguments.operation == "attention":
        compile_operation, letter, sizes, kinds = compile_attention, "D", arguments.head_dim, arguments.mask
    elif arguments.operation == "contrastive":
        compile_operation, letter, sizes, kinds = compile_contrastive, "M", arguments.num_keys, arguments.terms
    elif arguments.operation == "fusions":
        compile_operation, letter, sizes, kinds = compile_fusions, "E", arguments.size, ["forward", "backward"]
    elif arguments.operation == "lora":
        compile_operation, letter, sizes, kinds = compile_lora, "E", arguments.hidden_size, ["alone", "frozen"]
    else:
        compile_operation, letter, sizes, kinds = compile_pooling, "E", arguments.hidden_size, arguments.norm
    for dtype, size, kind in itertools.product(arguments.dtype, sizes, kinds):
        yield f"{dtype} {letter}{size} {kind}", compile_operation, (size, getattr(torch, dtype), kind)


def resources(kernel) -> dict:
    """`sass.resources` of a kernel that Triton compiled."""
    return sass.resources(kernel.asm["cubin"], kernel.metadata.shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    operations = ["attention", "contrastive", "pooling", "lora", "fusions"]
    parser.add_argument("--operation", default="attention", choices=operations)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[16, 32, 64, 80, 128, 256], help="attention")
    parser.add_argument("--mask", nargs="+", default=["plain", "dropout"], choices=list(MASKS), help="attention")
    parser.add_argument("--num-keys", type=int, nargs="+", default=[101, 65536], help="contrastive")
    parser.add_argument("--terms", nargs="+", default=list(TERMS), choices=TERMS, help="contrastive")
    parser.add_argument("--hidden-size", type=int, nargs="+", default=[576, 2048, 4096], help="pooling, lora")
    parser.add_argument("--norm", nargs="+", default=["none", "rms"], choices=["none", "rms"], help="pooling")
    parser.add_argument("--size", type=int, nargs="+", default=[576, 2048, 8192], help="fusions")
    parser.add_argument("--write", type=Path, help="merge the figures into this table")
    arguments = parser.parse_args()
    figures: dict[str, dict] = {}
    for capability, (configuration, compile_operation, settings) in itertools.product(
        arguments.capability, list(configurations(arguments))
    ):
        for kernel, row in compile_operation(capability, *settings).items():
            name = f"sm_{capability} {configuration} {kernel}"
            figures[name] = row
            print(f"{name}: " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if arguments.write is not None:
        table = json.loads(arguments.write.read_text()) if arguments.write.exists() else {}
        table.setdefault(triton.__version__, {}).update(figures)
        versions = []
        for version, rows in sorted(table.items()):
            lines = [
                f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items())
            ]  # a row to a line
            versions.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n  }")
        text = "{\n" + ",\n".join(versions) + "\n}"
        arguments.write.write_text(text + "\n")
    print(json.dumps({"triton": triton.__version__, "kernels": figures}))


if __name__ == "__main__":
    main()
