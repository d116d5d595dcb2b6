"""Products of a layer: over 8,192 tokens forward, and the weight of a few rows in its packed form; every way of decoding."""

import torch

from nvfp4_kernels.formats.tensor import MXFP8Tensor, NVFP4Tensor
from nvfp4_kernels.ops.matmul import triton


def empty(dtype, *shape):
    return torch.empty(shape, dtype=dtype, device="meta")


def operand(kind: str, rows: int, cols: int):
    fp8, u8 = torch.float8_e4m3fn, torch.uint8
    if kind == "nvfp4":
        parts = empty(u8, rows, cols // 2), empty(fp8, rows, cols // 16), empty(torch.float32)
        return NVFP4Tensor(*parts, (rows, cols))
    if kind == "mxfp8":
        return MXFP8Tensor(empty(fp8, rows, cols), empty(u8, rows, cols // 32), (rows, cols))
    return empty(getattr(torch, kind), rows, cols)


def case(a: str, b: str, M: int, N: int, K: int):
    return lambda: triton.run(operand(a, M, K), operand(b, N, K), None, torch.bfloat16, None, False)


SHAPES = (
    ("nvfp4", "nvfp4", 8192, 4096, 4096),
    ("nvfp4", "nvfp4", 16, 4096, 4096),
    ("nvfp4", "nvfp4", 192, 4096, 4096),
    ("bfloat16", "nvfp4", 1, 4096, 14336),
    ("bfloat16", "nvfp4", 16, 4096, 4096),
    ("bfloat16", "nvfp4", 192, 4096, 4096),
    ("bfloat16", "nvfp4", 192, 4096, 1840),
    ("mxfp8", "mxfp8", 192, 4096, 4096),
    ("float16", "nvfp4", 16, 4096, 4096),
    ("float16", "mxfp8", 192, 4096, 4096),
    ("float32", "nvfp4", 192, 4096, 4096),
)
CASES = {f"{a} x {b} {M}x{N}x{K}": case(a, b, M, N, K) for a, b, M, N, K in SHAPES}
