"""The logistic function in five instructions; tl.sigmoid takes eleven, most of them for results below 2^-126.

While an H200 moves 4 bytes, one value in and one out of a convolution, a lane has time for 28 instructions: of 26 for such a
value 19 are left.
"""

from nvfp4_kernels.ops._triton import INTERPRETED, jit, tl

WRITTEN_OUT = tl.constexpr(INTERPRETED)  # the interpreter runs no inline assembly
MINUS_LOG2E = tl.constexpr(-1.4426950408889634)


@jit
def logistic(x):
    """1 / (1 + exp(-x)) of fp32, to 2^-22 of it; 0 below -87.3."""
    if WRITTEN_OUT:
        return tl.sigmoid(x)
    else:
        power = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * MINUS_LOG2E], tl.float32, True, 1)
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [power + 1.0], tl.float32, True, 1)
