"""The experts' products over 8,192 tokens, forward and both gradients, and few tokens with NVFP4 weights: Nano and Super.

The first matrix reads the tokens gathered, the second rows that lie in order.
"""

import torch

from nvfp4_kernels.formats.groups import Columns, Stack, most_runs
from nvfp4_kernels.ops.grouped_matmul import triton


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def training(rows: int, experts: int, out: int, size: int, tokens: int | None = None):
    x, w, dy, offsets = (
        empty(tokens or rows, size),
        empty(experts, out, size),
        empty(rows, out),
        empty(experts + 1, dtype=torch.int64),
    )
    index = empty(rows, dtype=torch.int64) if tokens else None
    triton.run(Stack(x), Stack(w), offsets, torch.bfloat16, index)
    triton.run(Stack(dy), Stack(w.transpose(1, 2)), offsets, torch.bfloat16)
    triton.run(Stack(dy.t()), Stack(x.t()), offsets, torch.float32, index)


def quantized(kind: str, *shape, groups: int | None = None) -> Stack:
    """Row forms have one global scale, stacks and columns one a group."""
    fp8, u8 = torch.float8_e4m3fn, torch.uint8
    *lead, k = shape
    if kind == "mxfp8":
        return Stack(empty(*lead, k, dtype=fp8), empty(*lead, k // 32, dtype=u8))
    global_scales = empty(*([] if groups is None else [groups]), dtype=torch.float32)
    return Stack(empty(*lead, k // 2, dtype=u8), empty(*lead, k // 16, dtype=fp8), global_scales)


def quantized_training(kind: str, rows: int, experts: int, width: int, size: int, tokens: int):
    offsets = empty(experts + 1, dtype=torch.int64)
    up, down = (
        quantized(kind, experts, width, size, groups=experts),
        quantized(kind, experts, size, width, groups=experts),
    )
    index = empty(rows, dtype=torch.int64)
    triton.run(quantized(kind, tokens, size), up, offsets, torch.bfloat16, index)
    triton.run(quantized(kind, rows, width), down, offsets, torch.bfloat16)
    length = most_runs(rows, experts, 32) * 32
    dy, x = (Columns(*quantized(kind, n, length, groups=experts)[:3], offsets) for n in (width, size))
    triton.run(dy, x, offsets, torch.float32)
    triton.run(dy, Stack(empty(tokens, size).t()), offsets, torch.float32, index)


def decoding(rows: int, experts: int, width: int, size: int):
    codes, scales = (
        empty(experts, width, size // 2, dtype=torch.uint8),
        empty(experts, width, size // 16, dtype=torch.float8_e4m3fn),
    )
    offsets = empty(experts + 1, dtype=torch.int64)
    stack = Stack(codes, scales, empty(experts, dtype=torch.float32))
    triton.run(Stack(empty(rows, size)), stack, offsets, torch.bfloat16)


def frozen(rows: int, experts: int, width: int, size: int):
    """The gradient of x through NVFP4 weights, and what FP8 weights give."""
    x, dy, offsets = empty(rows, size), empty(rows, width), empty(experts + 1, dtype=torch.int64)
    triton.run(Stack(dy), quantized("nvfp4", experts, width, size, groups=experts).mT, offsets, torch.bfloat16)
    fp8 = Stack(empty(experts, width, size, dtype=torch.float8_e4m3fn), None, empty(experts, dtype=torch.float32))
    triton.run(Stack(x), fp8, offsets, torch.bfloat16)


CASES = {
    "Nano up, 8192 tokens": lambda: training(8192 * 6, 128, 1856, 2688, 8192),
    "Nano up, 8192 tokens, NVFP4 training": lambda: quantized_training("nvfp4", 8192 * 6, 128, 1856, 2688, 8192),
    "Nano up, 8192 tokens, MXFP8 training": lambda: quantized_training("mxfp8", 8192 * 6, 128, 1856, 2688, 8192),
    "Super up, 8192 tokens, NVFP4 training": lambda: quantized_training("nvfp4", 8192 * 22, 512, 2688, 1024, 8192),
    "Super down, 8192 tokens": lambda: training(8192 * 22, 512, 1024, 2688),
    "Nano up, 1 token": lambda: decoding(6, 128, 1856, 2688),
    "Nano down, 64 tokens": lambda: decoding(64 * 6, 128, 2688, 1856),
    "Nano up, 8192 tokens, frozen": lambda: frozen(8192 * 6, 128, 1856, 2688),
    "Super up, 8192 tokens, NVFP4": lambda: decoding(8192 * 22, 512, 2688, 1024),
}
