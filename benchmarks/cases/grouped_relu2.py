"""The experts' products around the squared ReLU over 8,192 tokens: Nano in bf16, Super by the NVFP4 recipe."""

import torch

from benchmarks.cases.grouped_matmul import empty, quantized
from nvfp4_kernels.formats.groups import Stack, rows_of
from nvfp4_kernels.formats.spec import DEFAULT_SIGNS
from nvfp4_kernels.ops.grouped_relu2 import triton


def training(x: Stack, up: Stack, dy: Stack, down: Stack, rows: int, quantizes: bool):
    signs = DEFAULT_SIGNS if quantizes else None
    offsets, index = empty(len(up.values) + 1, dtype=torch.int64), empty(rows, dtype=torch.int64)
    h, weights = empty(rows, rows_of(up)), empty(rows, dtype=torch.float32)
    triton.run(x, up, offsets, torch.bfloat16, index, weights, quantizes, signs)
    triton.backward(dy, down, offsets, h, weights, not quantizes, quantizes, signs)


def bf16(rows: int, experts: int, width: int, size: int, tokens: int):
    down = Stack(empty(experts, size, width).transpose(1, 2))
    x, up, dy = (Stack(empty(*shape)) for shape in ((tokens, size), (experts, width, size), (rows, size)))
    training(x, up, dy, down, rows, False)


def nvfp4(rows: int, experts: int, width: int, size: int, tokens: int):
    stack = quantized("nvfp4", experts, width, size, groups=experts)
    x, dy = quantized("nvfp4", tokens, size), quantized("nvfp4", rows, size)
    training(x, stack, dy, stack, rows, True)


CASES = {
    "Nano": lambda: bf16(8192 * 6, 128, 1856, 2688, 8192),
    "Super, NVFP4": lambda: nvfp4(8192 * 22, 512, 2688, 1024, 8192),
}
