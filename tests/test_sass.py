"""What benchmarks/bounds.py counts, against counts by hand."""

from benchmarks.sass import issued

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
    assert issued(SASS, 10, wanted=r"STG", shunned=r"LDG") == {"issue": 4, "memory": 1}


def test_loops_that_always_go_back_are_left_where_they_can_be():
    always = SASS.replace("@P2  BRA `(.L_x_1)", "     BRA `(.L_x_1)")
    call = always.replace("FFMA R8, R4, R5, R8", "@P3 CALL.REL.NOINC `(.L_x_3)")
    call = call.replace("        /*00a0*/", ".L_x_3:\n        /*00a0*/")
    assert issued(call, 10) == {"issue": 45, "mad": 1, "memory": 42, "integer": 10}  # less the jump back
