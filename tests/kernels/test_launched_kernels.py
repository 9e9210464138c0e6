"""Every kernel compiled as it is launched, without a GPU: what it is specialised on and becomes, against a table.

`launched.json` holds a row for each launch, architecture and Triton version, and on what Hopper's are specialised; what
is zero is left out. `before VERSION` are attention's rows before tile lists, boundaries and full tiles were told apart.
Embedding and training of Llama 1B are compiled here; the rest, other models, the benchmarks and what the GPU tests
launch, takes minutes:

    pytest -m slow tests/kernels/test_launched_kernels.py

and so it does with another Triton, from a folder that the environment names:

    pip download --no-deps triton==3.6.0 && unzip -d FOLDER triton-3.6.0-*.whl
    BIVEC_OTHER_TRITON=FOLDER pytest -m slow tests/kernels/test_launched_kernels.py

After a deliberate change say with `--table` what became worse, and write the rows anew, with each Triton:

    python -m bivec.benchmarks.launched_kernels --table tests/kernels/launched.json --write tests/kernels/launched.json
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bivec.benchmarks import sass

TABLE = Path(__file__).with_name("launched.json")
OTHER = "BIVEC_OTHER_TRITON"
SHARED_MEMORY_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may ask for

if missing := sass.missing_tools():
    pytest.skip(f"this Triton's wheel has no {' and no '.join(missing)}", allow_module_level=True)


@pytest.fixture(params=["installed", pytest.param("other", marks=pytest.mark.slow)])
def compiled(request):
    """compiled(arguments): the document of the tool, run where triton does not stand for its interpreter."""
    folders = list(sys.path)
    if request.param == "other":
        if OTHER not in os.environ:
            pytest.skip(f"{OTHER} names no folder: pip download --no-deps triton==3.6.0, unzip the wheel into one")
        folders.insert(0, os.environ[OTHER])
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(folder for folder in folders if folder)

    def run(*arguments: str) -> dict:
        command = [sys.executable, "-m", "bivec.benchmarks.launched_kernels", *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.stdout, result.stderr[-3000:]
        return json.loads(result.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def table() -> dict[str, dict]:
    return json.loads(TABLE.read_text())


def faults(document: dict, table: dict[str, dict]) -> list[str]:
    """In what a run of the tool is not what the table says."""
    found = [f"{name}: {row['error']}" for name, row in document["kernels"].items() if "error" in row]
    for name, signature in document["signatures"].items():
        if name not in table["signatures"]:
            found.append(f"{name} is not in the table: {signature}")
        elif signature != table["signatures"][name]:
            now, before = (set(text.split(", ")) for text in (signature, table["signatures"][name]))
            found.append(f"{name} is launched with {sorted(now - before)}, not {sorted(before - now)}")
    accepted = table.get(document["triton"], {})
    for name, row in document["kernels"].items():
        if "error" not in row and name in accepted:
            found += [f"{name}: {reason}" for reason in sass.worse(row, accepted[name])]
    return found + broken_promises(document["kernels"])


def broken_promises(rows: dict[str, dict]) -> list[str]:
    """What no kernel may do on any architecture or Triton."""
    found = []
    for name, row in rows.items():
        architecture, kernel = name.split()[0], name.split(": ")[-1].split()[0]
        if row.get("shared_bytes", 0) > SHARED_MEMORY_LIMIT[int(architecture.removeprefix("sm_"))]:
            found.append(f"{name} asks for {row['shared_bytes']} bytes of shared memory")
        if architecture == "sm_90" and kernel.startswith("attention_") and "loop_flops" in row:
            if not row.get("wgmma"):
                found.append(f"{name} does not use Hopper's matrix instructions")
            if row.get("loop_spilled_bytes"):
                found.append(f"{name} spills {row['loop_spilled_bytes']} bytes in its main loop")
    return found


@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_embedding_and_training_are_launched_and_compiled_as_the_table_says(compiled, table, capability):
    """What every path and, on Hopper, every benchmark launches; compiled what passes and steps of Llama 1B do."""
    sources = ["paths", "benchmarks"] if capability == "90" else ["paths"]
    match = "paths, (launched pass, llama-1B|encoding|training, [^,]*:)"
    document = compiled("--of", *sources, "--capability", capability, "--match", match)
    assert len(document["kernels"]) > 30
    assert capability != "90" or len(document["signatures"]) > len(document["kernels"])
    assert faults(document, table) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_embedding_training_and_benchmarks_on_every_architecture(compiled, table, capability):
    assert faults(compiled("--of", "paths", "benchmarks", "--capability", capability), table) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_the_gpu_tests_launch_compiles(compiled):
    document = compiled("--of", "tests", "--capability", "90")
    assert len(document["kernels"]) > 300
    assert [f"{name}: {row['error']}" for name, row in document["kernels"].items() if "error" in row] == []
    assert [fault for fault in broken_promises(document["kernels"]) if "shared memory" in fault] == []


def test_float8_needs_no_memory_for_spilled_registers_from_ada_on(python):
    """Norm, SwiGLU and rows of the largest usual models, on the first GPUs that have float8."""
    program = """
import json, torch
from bivec.benchmarks import sass
from bivec.benchmarks.absent_device import absent_device
from bivec.benchmarks.fake_cuda import FakeCuda
from bivec.benchmarks.launched_kernels import _compile
from bivec.kernels import float8

with FakeCuda((8, 9)) as fake:
    hidden, gate = (torch.empty(512, size, dtype=torch.bfloat16, device="cuda") for size in (8192, 28672))
    float8.quantize_rows(hidden)
    float8.quantized_rms_norm(hidden, hidden[0], 1e-5, add=hidden.clone())
    float8.quantized_swiglu(gate, gate)
found = []
with absent_device(89):
    for launch in fake.triton:
        compiled = _compile(launch)
        row = sass.resources(compiled.asm["cubin"], compiled.metadata.shared)
        found.append([launch.name, row["registers"], row["spilled_bytes"]])
print(json.dumps(found))
"""
    found = python(program, TRITON_INTERPRET="0")
    assert [name for name, *_ in found] == [
        "_quantize_rows_kernel",
        "_quantized_norm_kernel",
        "_quantized_swiglu_kernel",
    ]
    assert all(registers <= 64 and spilled == 0 for _, registers, spilled in found), found


def test_the_table_keeps_the_promises_for_both_tritons(table):
    """The committed rows keep them too, so that a table cannot be rewritten to hide a loss."""
    for version in ("3.6.0", "3.9.0"):
        assert {name for name in table[version] if name.startswith("sm_90")} == set(table["signatures"])
        assert broken_promises(table[version]) == [], version
        assert {name.split()[0] for name in table[version]} == {"sm_80", "sm_90", "sm_100"}


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_attentions_main_loops_are_no_longer_than_they_were(table, version):
    """To the same arithmetic, on Hopper, with a hundredth for the order that the assembler happens on."""
    before, now = table[f"before {version}"], table[version]
    names = [name for name in before if name.startswith("sm_90") and "short" not in name and name in now]
    assert len(names) >= 12
    for name in names:
        per_flop = [row["loop_instructions"] / row["loop_flops"] for row in (before[name], now[name])]
        assert per_flop[1] <= 1.01 * per_flop[0], name


def test_a_launch_that_is_another_or_new_or_worse_is_found(table):
    name = next(name for name in table["signatures"] if name.endswith(": attention_fwd_kernel"))
    signature, row = table["signatures"][name], table["3.9.0"][name]
    document = {"triton": "3.9.0", "signatures": {name: signature}, "kernels": {name: row}}
    assert faults(document, table) == []
    assert "stride_qt:i64" in signature.replace("stride_qt:i32 16", "stride_qt:i64")
    for changes in (
        {"signatures": {name: signature.replace("stride_qt:i32 16", "stride_qt:i64")}},
        {"signatures": {name + " 2": signature}},
        {"kernels": {name: row | {"registers": row["registers"] + 1}}},
        {"kernels": {name: {"error": "CompilationError: no"}}},
    ):
        assert len(faults(document | changes, table)) == 1


def test_types_alignment_and_values_of_arguments_are_told_apart(python):
    """On the real binder, for a norm's launch whose arguments are changed one by one."""
    program = """
import dataclasses, json, torch
from bivec.benchmarks.fake_cuda import FakeCuda
from bivec.benchmarks.launched_kernels import absent_device, specialised
from bivec.kernels.norm import rms_norm

with FakeCuda() as fake:
    rows = torch.empty(64, 128, dtype=torch.bfloat16, device="cuda")
    shifted = torch.empty(64 * 128 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(64, 128)
    rms_norm(rows, rows[0], 1e-5)
    wide = torch.empty(64, 128, dtype=torch.float64, device="cuda")
launch = fake.triton[0]
strides = [{"stride_x": value} for value in (2**31, 127, 1, 0.5)]
changes = [{}, {"x_ptr": shifted}, {"x_ptr": wide}, *strides]
found = []
for change in changes:
    with absent_device(90):
        changed = dataclasses.replace(launch, arguments=launch.arguments | change)
        found.append(specialised(changed).split(", "))
print(json.dumps([sorted(set(words) - set(found[0])) for words in found]))
"""
    x = ["x_ptr:*bf16"], ["x_ptr:*fp64 16"]
    stride = ["stride_x:i64 16"], ["stride_x:i32"], ["stride_x=1"], ["stride_x:fp32"]
    assert python(program, TRITON_INTERPRET="0") == [[], *x, *stride]
