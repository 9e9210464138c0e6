"""The main loop of a kernel's machine code, and what is counted in it."""

import pytest

from bivec.benchmarks.sass import main_loop, parse, product, regions, worse

SEARCH_AND_PRODUCTS = """
_kernel:
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R0, desc[UR4][R2.64] ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/              @!P1 EXIT ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
.L_x_2:
        /*0070*/                   LDGSTS.E.BYPASS.128 [R1+0x800], desc[UR42][R26.64], !P1 ;
.L_x_3:
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], RZ, !UPT ;
        /*0090*/                   HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8].tnspB, R24, gsb0 ;
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4], R3 ;
        /*00b0*/              @!P2 BRA `(.L_x_6) ;
.L_x_4:
        /*00c0*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR42][R26.64], !P1 ;
        /*00d0*/                   LDGSTS.E [R1], desc[UR42][R28.64], !P1 ;
        /*00e0*/                   BRA.U UP0, `(.L_x_3) ;
        /*00f0*/               @P0 BRA `(.L_x_2) ;
.L_x_5:
        /*0100*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], RZ, !UPT ;
        /*0110*/                   FSETP.GEU.AND P0, PT, R1, R2, PT ;
        /*0120*/                   FSEL R1, R2, R3, P0 ;
        /*0130*/                   HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0140*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR42][R26.64], !P1 ;
        /*0150*/                   LDGSTS.E [R1], desc[UR42][R28.64], !P1 ;
        /*0160*/                   FADD R1, R2, R3 ;
        /*0170*/                   FADD R1, R2, R3 ;
        /*0180*/                   FADD R1, R2, R3 ;
        /*0190*/               @P0 BRA `(.L_x_5) ;
        /*01a0*/                   EXIT ;
.L_x_6:
        /*01b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4], R3 ;
        /*01c0*/              @!P2 BRA `(.L_x_6) ;
        /*01d0*/                   BRA `(.L_x_4) ;
.L_x_7:
        /*01e0*/                   BRA `(.L_x_7);
.L_x_8:
"""


def test_the_main_loop_is_the_shortest_of_those_that_multiply_most():
    """Not the search, not the products before the loops, not the loop around it, not its masked copy; of the wait that
    stands behind the end only what runs once an iteration.
    """
    loop = main_loop(parse(SEARCH_AND_PRODUCTS))
    kinds = [instruction.kind for instruction in loop]
    assert kinds == ["HGMMA", "HGMMA", "SYNCS", "BRA", "LDGSTS", "LDGSTS", "BRA", "BRA"]
    assert loop[-1].operands == "`(.L_x_4)"


def test_the_code_that_no_path_reaches_is_in_no_region():
    found = regions(parse(SEARCH_AND_PRODUCTS))
    assert [region.depth for region in found] == [0, 1, 1, 2, 1, 3]
    assert sum(len(region.instructions) for region in found) == len(parse(SEARCH_AND_PRODUCTS)) - 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], RZ, !UPT", ("HGMMA.64x64x16 shared", 32768)),
        ("HGMMA.64x128x16.F32 R24, R120, gdesc[UR8].tnspB, R24", ("HGMMA.64x128x16 registers", 65536)),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", ("HMMA.16x8x16", 4096)),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", ("HMMA.16x8x8", 2048)),
        ("UTCHMMA gdesc[UR30], gdesc[UR12], tmem[UR7], tmem[UR16], idesc[UR17], !UPT", ("UTCHMMA", 1)),
        ("FFMA R1, R2, R3, R4", None),
    ],
)
def test_products_are_known_by_shape(text, expected):
    (instruction,) = parse(f"        /*0000*/                   {text} ;")
    assert product(instruction) == expected


@pytest.mark.parametrize(
    ("opcode", "num_bytes"),
    [("LDG.E.128.CONSTANT", 16), ("LDG.E.64", 8), ("LDG.E", 4), ("LDG.E.U16", 2), ("LDG.E.S8", 1), ("LDL.LU.64", 8)],
)
def test_widths_are_read_from_the_name(opcode, num_bytes):
    (instruction,) = parse(f"        /*0000*/              @!P0 {opcode} R0, [R2] ;")
    assert instruction.predicated
    assert instruction.width == num_bytes


def test_a_search_is_no_main_loop():
    loop = main_loop(parse(SEARCH_AND_PRODUCTS.split("        /*0040*/")[0] + "        /*0040*/    EXIT ;\n"))
    assert [instruction.kind for instruction in loop] == ["LDC", "EXIT", "EXIT"]


ROW = {
    "registers": 200,
    "spilled_bytes": 8,
    "shared_bytes": 4096,
    "loop_instructions": 400,
    "loop_spilled_bytes": 0,
    "loop_flops": 1024,
    "loop_bytes": 64,
    "loop_products": {"HGMMA.64x128x16 registers": 4, "HGMMA.64x64x16 shared": 8},
    "loop_loads": {"LDGSTS.128": 8, "LDGSTS.32": 2},
}


@pytest.mark.parametrize(
    "changes",
    [
        {"registers": 201},
        {"spilled_bytes": 12},
        {"shared_bytes": 4112},
        {"loop_spilled_bytes": 4},
        {"loop_instructions": 401},
        {"loop_flops": 1023},
        {"loop_products": {"HGMMA.64x128x16 registers": 4, "HGMMA.64x32x16 shared": 16}},
        {"loop_products": {"HGMMA.64x64x16 shared": 16}},
        {"loop_products": {"HMMA.16x8x16": 64}},
        {"loop_loads": {"LDGSTS.64": 16, "LDGSTS.32": 2}},
        {"loop_loads": {"LDGSTS.128": 8, "LDGSTS.32": 3}},
    ],
    ids=str,
)
def test_each_of_the_resources_may_not_get_worse(changes):
    assert len(worse(ROW | changes, ROW)) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"registers": 180, "spilled_bytes": 0, "shared_bytes": 0},
        {"loop_instructions": 700, "loop_flops": 2048},  # a tile of twice the size
        {"loop_products": {"HGMMA.64x128x16 registers": 12}},
        {"loop_loads": {"UTMALDG": 1}},
        {"loop_loads": {}},
    ],
    ids=str,
)
def test_what_is_better_passes(changes):
    assert worse(ROW | changes, ROW) == []


def test_a_loop_without_products_is_counted_by_bytes():
    memory = ROW | {"loop_flops": 0, "loop_products": {}}
    assert worse(memory | {"loop_instructions": 800, "loop_bytes": 128}, memory) == []
    assert len(worse(memory | {"loop_bytes": 32}, memory)) == 1
