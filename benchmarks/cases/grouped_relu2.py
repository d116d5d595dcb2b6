"""The experts' products around the squared ReLU over 8,192 tokens, in high precision and quantized: Nano and Super."""

import torch

from benchmarks.cases.grouped_matmul import empty, quantized
from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops.grouped_relu2 import triton


def training(rows: int, experts: int, width: int, size: int, tokens: int, kind: str | None = None):
    """kind: of the operands, None for bf16. In high precision backward gives the squares again, quantized none."""
    if kind:
        x, up = quantized(kind, tokens, size), quantized(kind, experts, width, size, groups=experts)
        dy, down = quantized(kind, rows, size), up
    else:
        x, up, dy = Stack(empty(tokens, size)), Stack(empty(experts, width, size)), Stack(empty(rows, size))
        down = Stack(empty(experts, size, width).transpose(1, 2))
    offsets, index = empty(experts + 1, dtype=torch.int64), empty(rows, dtype=torch.int64)
    h, weights = empty(rows, width), empty(rows, dtype=torch.float32)
    triton.run(x, up, offsets, torch.bfloat16, index, weights, False)
    triton.backward(dy, down, offsets, h, weights, kind is None, False)


CASES = {
    "Nano": lambda: training(8192 * 6, 128, 1856, 2688, 8192),
    "Nano, NVFP4": lambda: training(8192 * 6, 128, 1856, 2688, 8192, "nvfp4"),
    "Nano, MXFP8": lambda: training(8192 * 6, 128, 1856, 2688, 8192, "mxfp8"),
    "Super, NVFP4": lambda: training(8192 * 22, 512, 2688, 1024, 8192, "nvfp4"),
}
