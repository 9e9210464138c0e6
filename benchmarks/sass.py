"""The machine code of a compiled kernel, read without a GPU: registers, spills, products, loads and the main loop.

The main loop is found in the control flow, not guessed from the text. A backward branch closes a loop when every path
to it passes the loop's first instruction; an instruction belongs to the innermost loop around it. The main loop is the
one with the most work: arithmetic of the tensor cores or, in a kernel that has none, bytes moved from and to global
memory; of equals the more deeply nested, then the shortest: the body that runs most, where a masked copy stands beside
it. Where no loop works (a search moves a word a thread), the code outside all loops stands for it.
"""

import collections
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NEEDED = ("nvdisasm", "cuobjdump")
WORK_BYTES = 16  # a loop whose thread moves less from and to global memory is a search

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z0-9][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


class Instruction(NamedTuple):
    """One line of machine code: does it run only under a predicate, what is it, on what, and where does it branch."""

    predicated: bool
    opcode: str
    operands: str
    target: int | None

    @property
    def kind(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def width(self) -> int:
        """Bytes that one thread moves; 4 where the instruction's name says nothing."""
        modifiers = self.opcode.split(".")[1:]
        if "U8" in modifiers or "S8" in modifiers:
            return 1
        if "U16" in modifiers or "S16" in modifiers:
            return 2
        return next((int(bits) // 8 for bits in ("256", "128", "64") if bits in modifiers), 4)


def missing_tools() -> list[str]:
    """Those of nvidia's tools that this Triton wheel lacks."""
    return [tool for tool in NEEDED if not (TOOLS / tool).exists()]


def disassemble(cubin: bytes) -> tuple[str, str]:
    """The machine code's text, and the tools' report of what it uses."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)

        def run(tool: str, *options: str) -> str:
            command = [str(TOOLS / tool), *options, str(path)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        # without the data flow, which only adds remarks, half as slow
        return run("nvdisasm", "-ndf", "-c"), run("cuobjdump", "-res-usage")


def parse(text: str) -> list[Instruction]:
    """Instructions in their order, branches with the number of the instruction that they go to."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := _INSTRUCTION.match(line):
            found.append((match[2] or "", match[3], match[4].strip()))
    instructions = []
    for predicate, opcode, operands in found:
        target = _TARGET.search(operands) if opcode.startswith("BRA") else None
        # `BRA.U UP0, label` carries its predicate as an operand
        predicated = bool(predicate) or (target is not None and not operands.startswith("`"))
        instructions.append(Instruction(predicated, opcode, operands, labels[target[1]] if target else None))
    return instructions


def _successors(instructions: list[Instruction]) -> list[list[int]]:
    following = []
    for index, instruction in enumerate(instructions):
        after = [] if instruction.target is None else [instruction.target]
        ends = instruction.kind in ("EXIT", "RET") or instruction.target is not None
        if (not ends or instruction.predicated) and index + 1 < len(instructions):
            after.append(index + 1)
        following.append(after)
    return following


def _blocks(instructions: list[Instruction]) -> tuple[list[range], list[list[int]]]:
    """Instructions that run together, and for each block the numbers of those that may come next."""
    following = _successors(instructions)
    starts = {0}
    for index, after in enumerate(following):
        if after != [index + 1]:
            starts.update(after, [index + 1])
    bounds = sorted(start for start in starts if start < len(instructions))
    number = {start: block for block, start in enumerate(bounds)}
    blocks = [range(start, end) for start, end in zip(bounds, [*bounds[1:], len(instructions)], strict=True)]
    return blocks, [[number[start] for start in following[block[-1]]] for block in blocks]


def _dominators(after: list[list[int]]) -> dict[int, set[int]]:
    """For each block that can be reached, the blocks that every path to it passes."""
    order, pending = {0}, [0]
    while pending:
        for block in after[pending.pop()]:
            if block not in order:
                order.add(block)
                pending.append(block)
    before = collections.defaultdict(list)
    for block in order:
        for following in after[block]:
            before[following].append(block)
    dominators = {block: set(order) for block in order} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(order - {0}):
            common = set.intersection(*(dominators[previous] for previous in before[block])) | {block}
            changed |= common != dominators[block]
            dominators[block] = common
    return dominators


class Region(NamedTuple):
    """The instructions of a loop without the loops inside it, or of no loop at all, at depth 0."""

    depth: int
    instructions: list[Instruction]


def regions(instructions: list[Instruction]) -> list[Region]:
    """The code in no loop, then the loops."""
    blocks, after = _blocks(instructions)
    dominators = _dominators(after)
    loops: dict[int, set[int]] = {}  # first block -> blocks
    for block in dominators:
        for first in after[block]:
            if first in dominators[block]:
                body, pending = loops.setdefault(first, {first}), [block]
                while pending:
                    inside = pending.pop()
                    if inside not in body:
                        body.add(inside)
                        pending += [previous for previous in dominators if inside in after[previous]]
    found = {-1: Region(0, [])}
    for block in sorted(dominators):
        around = sorted((first for first in loops if block in loops[first]), key=lambda first: len(loops[first]))
        region = found.setdefault(around[0] if around else -1, Region(len(around), []))
        region.instructions.extend(instructions[index] for index in blocks[block])
    return list(found.values())


def product(instruction: Instruction) -> tuple[str, int] | None:
    """A tensor-core instruction's name with its shape, and the multiplications and additions that a warp makes by it.

    Hopper's is one of four warps together, and its name says whether the first operand comes from registers. What
    Blackwell multiplies is not in the instruction: each counts as one.
    """
    if instruction.kind == "HGMMA":
        shape = re.search(r"\.(\d+)x(\d+)x(\d+)\.", instruction.opcode + ".")
        assert shape is not None, instruction
        rows, columns, depth = map(int, shape.groups())
        operands = [operand.strip() for operand in instruction.operands.split(",")]
        left = "shared" if operands[1].startswith("gdesc") else "registers"
        return f"HGMMA.{rows}x{columns}x{depth} {left}", rows * columns * depth * 2 // 4
    if instruction.kind == "HMMA":
        shape = re.search(r"\.(16)(8)(\d+)\.", instruction.opcode + ".")
        assert shape is not None, instruction
        return f"HMMA.16x8x{shape[3]}", 16 * 8 * int(shape[3]) * 2
    if re.fullmatch(r"UTC\w*MMA", instruction.kind):
        return instruction.kind, 1
    return None


def _loads(instructions: Iterable[Instruction]) -> dict[str, int]:
    """How many loads from global memory there are by kind and bits: `{"LDGSTS.128": 8}`."""
    counts: collections.Counter[str] = collections.Counter()
    for instruction in instructions:
        if instruction.kind in ("LDG", "LDGSTS"):
            counts[f"{instruction.kind}.{8 * instruction.width}"] += 1
        elif instruction.kind == "UTMALDG":
            counts["UTMALDG"] += 1
    return dict(sorted(counts.items()))


def _flops(instructions: Iterable[Instruction]) -> int:
    return sum(found[1] for instruction in instructions if (found := product(instruction)))


def _bytes(instructions: Iterable[Instruction]) -> int:
    moved = ("LDG", "LDGSTS", "STG", "REDG", "RED", "ATOMG")
    return sum(instruction.width for instruction in instructions if instruction.kind in moved)


def _spilled(instructions: Iterable[Instruction]) -> int:
    return sum(instruction.width for instruction in instructions if instruction.kind in ("LDL", "STL"))


def main_loop(instructions: list[Instruction]) -> list[Instruction]:
    """The instructions of the loop that does the work, see above."""
    outside, *loops = regions(instructions)
    working = [loop for loop in loops if _flops(loop.instructions) or _bytes(loop.instructions) >= WORK_BYTES]
    if any(_flops(region.instructions) for region in (outside, *loops)):
        working = [loop for loop in loops if _flops(loop.instructions)]

    def work(region: Region) -> tuple[int, int, int, int]:
        body = region.instructions
        return _flops(body), _bytes(body), region.depth, -len(body)

    return max(working or [outside], key=work).instructions


def resources(cubin: bytes, shared_bytes: int) -> dict:
    """What a kernel takes of the machine.

    Returns:
        registers (a thread), spilled_bytes (a thread, of the instructions that store and load again), shared_bytes (a
        block), instructions, wgmma and mma (tensor-core instructions: Hopper's, others); of the main loop:
        loop_instructions, loop_spilled_bytes, loop_flops (a warp's, on tensor cores), loop_bytes (a thread's, from and
        to global memory), loop_products and loop_loads (instructions by kind and shape).
    """
    text, report = disassemble(cubin)
    registers = re.search(r"\bREG:(\d+)", report)
    assert registers is not None, report
    instructions = parse(text)
    names = collections.Counter(instruction.kind for instruction in instructions if product(instruction))
    loop = main_loop(instructions)
    products = collections.Counter(found[0] for instruction in loop if (found := product(instruction)))
    return {
        "registers": int(registers[1]),
        "spilled_bytes": _spilled(instructions),
        "shared_bytes": shared_bytes,
        "instructions": len(instructions),
        "wgmma": names["HGMMA"],
        "mma": sum(names.values()) - names["HGMMA"],
        "loop_instructions": len(loop),
        "loop_spilled_bytes": _spilled(loop),
        "loop_flops": _flops(loop),
        "loop_bytes": _bytes(loop),
        "loop_products": dict(sorted(products.items())),
        "loop_loads": _loads(loop),
    }


def worse(row: dict, accepted: dict) -> list[str]:
    """In what a kernel's resources are worse than the accepted ones; what a row lacks is zero.

    Registers, spills and shared memory may not grow, nor the instructions of the main loop to a unit of its work: to a
    product's arithmetic or, where there is none, to a byte moved. Its loads may not become narrower, nor the N of its
    products, nor may these leave the tensor cores of the architecture.
    """
    found = []
    for key in ("registers", "spilled_bytes", "shared_bytes", "loop_spilled_bytes"):
        if row.get(key, 0) > accepted.get(key, 0):
            found.append(f"{key}: {row[key]}, was {accepted.get(key, 0)}")
    unit = next((key for key in ("loop_flops", "loop_bytes") if accepted.get(key)), "")
    work, accepted_work = (figures.get(unit, 0) if unit else 1 for figures in (row, accepted))
    if row["loop_instructions"] * accepted_work > accepted["loop_instructions"] * work:
        was = f"{accepted['loop_instructions']} to {accepted_work}"
        found.append(f"loop_instructions to {unit or 'one pass'}: {row['loop_instructions']} to {work}, was {was}")
    loads, accepted_loads = (figures.get("loop_loads", {}) for figures in (row, accepted))
    # a loop that no longer loads has nothing narrow
    if loads and _load_bits(loads) < _load_bits(accepted_loads):
        found.append(f"loop_loads: {loads}, was {accepted_loads}")
    products, accepted_products = (figures.get("loop_products", {}) for figures in (row, accepted))
    if _product_columns(products) < _product_columns(accepted_products):
        found.append(f"loop_products: {products}, was {accepted_products}")
    return found


def _load_bits(loads: dict[str, int]) -> float:
    """Bits that a load from global memory brings a thread, on average; a copy of a whole tile is the widest."""
    widths = [(1024 if kind == "UTMALDG" else int(kind.split(".")[1]), count) for kind, count in loads.items()]
    return sum(bits * count for bits, count in widths) / sum(loads.values()) if loads else 0.0


def _product_columns(products: dict[str, int]) -> tuple[int, ...]:
    """The smallest and the largest N of Hopper's products; others have one shape."""
    columns = [int(kind.split("x")[1]) for kind in products if kind.startswith("HGMMA")]
    return (min(columns), max(columns)) if columns else ()
