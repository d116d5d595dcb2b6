"""Prints the PTX that Triton's compiler makes for sm_90, without a GPU, of a product of 64 x 64 by 64 x 128, both along k."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a, b, out):
    rows, cols, k = tl.arange(0, 64)[:, None], tl.arange(0, 128)[:, None], tl.arange(0, 64)[None, :]
    sums = tl.dot(tl.load(a + rows * 64 + k), tl.load(b + cols * 64 + k).T)
    tl.store(out + rows * 128 + tl.arange(0, 128)[None, :], sums)


if __name__ == "__main__":
    source = ASTSource(product, {"a": "*bf16", "b": "*bf16", "out": "*fp32"})
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"])
