"""Prints the PTX that Triton's compiler makes for sm_100, without a GPU, of a tile of 128 x N in tl.dot_scaled of NVFP4.

python tests/oracles/triton_sm100.py 256
"""

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def block_scaled(a, a_scales, b, b_scales, out, K, N: tl.constexpr):
    """Scales come in 128x4 order, so that the compiler copies them by tcgen05.cp as csrc/matmul/sm100.cuh does."""
    sums = tl.zeros([128, N], tl.float32)
    for k in tl.range(0, K // 256, num_stages=2):
        left, right = a.load([0, 128 * k]), b.load([0, 128 * k])
        s = a_scales.load([0, 0, 4 * k, 0, 0]).reshape(1, 4, 32, 4, 4).trans(0, 3, 2, 1, 4).reshape(128, 16)
        t = b_scales.load([0, 0, 4 * k, 0, 0]).reshape(N // 128, 4, 32, 4, 4).trans(0, 3, 2, 1, 4).reshape(N, 16)
        sums = tl.dot_scaled(left, s, "e2m1", right.T, t, "e2m1", sums)
    tl.store(out + tl.arange(0, 128)[:, None] * N + tl.arange(0, N)[None, :], sums)


if __name__ == "__main__":
    n = int(sys.argv[1])
    types = {
        "a": "tensordesc<u8[128,128]>",
        "a_scales": "tensordesc<fp8e4nv[1,1,4,2,256]>",
        "b": f"tensordesc<u8[{n},128]>",
        "b_scales": f"tensordesc<fp8e4nv[1,{n // 128},4,2,256]>",
        "out": "*fp32",
        "K": "i32",
        "N": "constexpr",
    }
    source = ASTSource(block_scaled, types, {"N": n}, {(5,): [["tt.divisibility", 16]]})
    print(triton.compile(source, target=GPUTarget("cuda", 100, 32), options={"num_warps": 4}).asm["ptx"])
