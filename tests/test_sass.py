"""What is read from SASS, against what one reads by hand."""

import pytest

from benchmarks.sass import issued, overwritten, written

# 3 instructions, a loop of 7 of which 2 handle what is rare, out of it to the end; a function behind it.
SASS = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P1 BRA `(.L_x_9) ;
        /*0020*/                   IMAD.WIDE R2, R0, 0x10, R2 ;
.L_x_1:
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   ISETP.GE.AND P0, PT, R0, R9, PT ;
        /*0050*/              @P0  BRA `(.L_x_2) ;
        /*0060*/                   MUFU.RCP R4, R4 ;
        /*0070*/                   CALL.REL.NOINC `($__internal_0_$__div) ;
.L_x_2:
        /*0080*/                   FFMA R8, R4, R5, R8 ;
        /*0090*/              @P2  BRA `(.L_x_1) ;
        /*00a0*/                   STG.E.64 desc[UR4][R2.64], R8 ;
        /*00b0*/                   EXIT ;
.L_x_9:
        /*00c0*/                   STG.E desc[UR4][R2.64], RZ ;
        /*00d0*/                   EXIT ;
"""


def test_hot_path_by_hand():
    # S2R, BRA, IMAD; LDG, ISETP, BRA, FFMA, BRA in each turn; STG, EXIT. A load of 128 bits is 4 wavefronts, a store of 64 two.
    assert issued(SASS, 1) == {"issue": 10, "mad": 1, "memory": 6, "integer": 1, "fp32": 1}
    assert issued(SASS, 10) == {"issue": 55, "mad": 1, "memory": 42, "integer": 10, "fp32": 10}


def test_marks_choose_the_path():
    rare = issued(SASS, 10, wanted=r"LDG|MUFU")
    assert rare["slow"] == 10 and rare["issue"] == 75
    assert issued(SASS, 10, wanted=r"STG|LDG|FFMA", shunned=r"LDG") == {"issue": 4, "memory": 1}


def test_loops_that_always_go_back_are_left_where_they_can_be():
    always = SASS.replace("@P2  BRA `(.L_x_1)", "     BRA `(.L_x_1)")
    call = always.replace("FFMA R8, R4, R5, R8", "@P3 CALL.REL.NOINC `(.L_x_3)")
    call = call.replace("        /*00a0*/", ".L_x_3:\n        /*00a0*/")
    assert issued(call, 10) == {"issue": 45, "mad": 1, "memory": 42, "integer": 10}  # less the jump back


def test_loops_that_are_left_at_their_head():
    sass = """
.L_x_1:
        /*0000*/                   ISETP.GE.AND P0, PT, R0, R9, PT ;
        /*0010*/              @P0  BRA `(.L_x_2) ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0050*/                   EXIT ;
"""
    assert issued(sass, 10) == {"issue": 42, "integer": 10, "memory": 41}


@pytest.mark.parametrize(
    "instruction, registers",
    [
        ("IADD3 R4, P0, PT, R5, R6, RZ", [4]),
        ("@!P1 LDS.128 R8, [R4+0x10]", [8, 9, 10, 11]),
        ("LDG.E.64 R6, desc[UR4][R2.64]", [6, 7]),
        ("IMAD.WIDE.U32 R2, R0, 0x10, R2", [2, 3]),
        ("LDSM.16.MT88.4 R12, [R3]", [12, 13, 14, 15]),
        ("SHFL.IDX PT, R5, R6, R7, 0x1f", [5]),
        ("HMMA.16816.F32.BF16 R20, R4, R8, R20", [20, 21, 22, 23]),
        ("HGMMA.64x16x16.F32.BF16 R24, R152, gdesc[UR16], R24, gsb0", list(range(24, 32))),
        ("CS2R R40, SRZ", [40, 41]),
        ("ISETP.GE.AND P0, PT, R0, R9, PT", []),
        ("FCHK P0, R4, R5", []),
        ("R2P PR, R4, 0x7f", []),
        ("LOP3.LUT P0, RZ, R4, 0x3, RZ, 0xc0, !PT", []),
        ("STS.128 [R4], R8", []),
        ("STG.E.64 desc[UR4][R2.64], R8", []),
        ("R2UR UR4, R5", []),
        ("BAR.SYNC.DEFER_BLOCKING R4, 0x80", []),
    ],
)
def test_registers_that_an_instruction_writes(instruction, registers):
    assert list(written(instruction)) == registers


# Two products from registers, of which one is on its way while the other's operand is loaded, over the jump back too.
PRODUCTS = """
.text.kernel:
.L_x_1:
        /*0000*/                   LDS.128 R4, [R2] ;
        /*0010*/                   WARPGROUP.ARRIVE ;
        /*0020*/                   HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR16], R24, gsb0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/                   LDS.128 R8, [R2+0x10] ;
        /*0050*/                   HGMMA.64x16x16.F32.BF16 R24, R8, gdesc[UR16], R24, gsb0 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   MOV R8, RZ ;
        /*00a0*/                   EXIT ;
"""


def test_operands_of_products_that_are_overwritten():
    assert overwritten(PRODUCTS) == []
    assert overwritten(PRODUCTS.replace("LDS.128 R4", "LDS.128 R8")) == ["0: LDS.128 R8, [R2]"]  # in the second turn
    assert overwritten(PRODUCTS.replace("gsb0, 0x0", "gsb0, 0x1")) == ["9: MOV R8, RZ"]
    assert overwritten(PRODUCTS.replace("WARPGROUP.DEPBAR.LE gsb0, 0x1", "NOP")) == [
        "0: LDS.128 R4, [R2]",
        "4: LDS.128 R8, [R2+0x10]",
    ]
