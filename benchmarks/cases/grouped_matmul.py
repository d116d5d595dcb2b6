"""The experts' products over 8,192 tokens, forward and both gradients, and few tokens with NVFP4 weights: Nano and Super."""

import torch

from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops.grouped_matmul import triton


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def training(rows: int, experts: int, width: int, size: int):
    x, w, dy, offsets = (
        empty(rows, size),
        empty(experts, width, size),
        empty(rows, width),
        empty(experts + 1, dtype=torch.int64),
    )
    triton.run(x, Stack(w), offsets, torch.bfloat16)
    triton.run(dy, Stack(w.transpose(1, 2)), offsets, torch.bfloat16)
    triton.run(dy.t(), Stack(x.t()), offsets, torch.float32)


def decoding(rows: int, experts: int, width: int, size: int):
    codes, scales = (
        empty(experts, width, size // 2, dtype=torch.uint8),
        empty(experts, width, size // 16, dtype=torch.float8_e4m3fn),
    )
    offsets = empty(experts + 1, dtype=torch.int64)
    stack = Stack(codes, scales, empty(experts, dtype=torch.float32))
    triton.run(empty(rows, size), stack, offsets, torch.bfloat16)


CASES = {
    "Nano up, 8192 tokens": lambda: training(8192 * 6, 128, 1856, 2688),
    "Super up, 8192 tokens": lambda: training(8192 * 22, 512, 2688, 1024),
    "Nano up, 1 token": lambda: decoding(6, 128, 1856, 2688),
    "Nano down, 64 tokens": lambda: decoding(64 * 6, 128, 2688, 1856),
    "Super up, 8192 tokens, NVFP4": lambda: decoding(8192 * 22, 512, 2688, 1024),
}
