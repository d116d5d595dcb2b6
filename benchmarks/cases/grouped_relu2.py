"""The experts' products around the squared ReLU over 8,192 tokens: Nano in bf16, Super quantized, its weights frozen."""

import torch

from benchmarks.cases.grouped_matmul import empty, quantized
from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops.grouped_relu2 import triton


def training(x: Stack, up: Stack, dy: Stack, down: Stack, rows: int, again: bool, amax: bool):
    """again: as in bf16, amax: as with frozen weights."""
    offsets, index = empty(len(up.values) + 1, dtype=torch.int64), empty(rows, dtype=torch.int64)
    h, weights = empty(rows, up.rows), empty(rows, dtype=torch.float32)
    triton.run(x, up, offsets, torch.bfloat16, index, weights, amax)
    triton.backward(dy, down, offsets, h, weights, again, amax)


def bf16(rows: int, experts: int, width: int, size: int, tokens: int):
    down = Stack(empty(experts, size, width).transpose(1, 2))
    x, up, dy = (Stack(empty(*shape)) for shape in ((tokens, size), (experts, width, size), (rows, size)))
    training(x, up, dy, down, rows, again=True, amax=False)


def nvfp4(rows: int, experts: int, width: int, size: int, tokens: int):
    stack = quantized("nvfp4", experts, width, size, groups=experts)
    x, dy = quantized("nvfp4", tokens, size), quantized("nvfp4", rows, size)
    training(x, stack, dy, stack, rows, again=False, amax=True)


CASES = {
    "Nano": lambda: bf16(8192 * 6, 128, 1856, 2688, 8192),
    "Super, NVFP4, frozen": lambda: nvfp4(8192 * 22, 512, 2688, 1024, 8192),
}
