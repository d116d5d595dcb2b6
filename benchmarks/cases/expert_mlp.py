"""The experts of Nano for one token and for 64, and of Super for 64, weights in NVFP4: all launches of a step."""

import torch

from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops.expert_mlp import triton


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def stack(experts: int, rows: int, cols: int) -> Stack:
    scales = empty(experts, rows, cols // 16, dtype=torch.float8_e4m3fn)
    return Stack(empty(experts, rows, cols // 2, dtype=torch.uint8), scales, empty(experts, dtype=torch.float32))


def step(tokens: int, experts: int, top_k: int, size: int, width: int):
    integers = dict(dtype=torch.int64)
    offsets, inverse = empty(experts + 1, **integers), empty(tokens, top_k, **integers)
    order, weights = empty(tokens * top_k, **integers), empty(tokens, top_k, dtype=torch.float32)
    up, down = stack(experts, width, size), stack(experts, size, width)
    triton.run(empty(tokens, size), weights, offsets, inverse, order, up, down)


CASES = {
    "Nano, 1 token": lambda: step(1, 128, 6, 2688, 1856),
    "Nano, 64 tokens": lambda: step(64, 128, 6, 2688, 1856),
    "Super, 64 tokens": lambda: step(64, 512, 22, 1024, 2688),
}
