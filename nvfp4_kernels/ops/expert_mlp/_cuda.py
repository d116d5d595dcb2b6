"""Packed experts in CUDA: two launches of csrc/matmul/cuda.cu, the first of which reads the tokens where they lie and squares
what it writes, then the sum over each token's choices, in Triton or else in torch. The host reads nothing back."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack, is_packed, rows_of
from nvfp4_kernels.ops import _cuda
from nvfp4_kernels.ops.grouped_matmul._cuda import run_groups
from nvfp4_kernels.ops.matmul._cuda_launch import Groups
from nvfp4_kernels.ops.permute import reference, triton


def refuses(
    x: Tensor, weights: Tensor, offsets: Tensor, inverse: Tensor, order: Tensor, up: Stack, down: Stack
) -> str | None:
    if not (is_packed(up) and is_packed(down)):
        return "the CUDA kernels multiply packed stacks alone"
    if x.dtype != torch.bfloat16:
        return "packed weights are multiplied by rows of bfloat16"
    return _cuda.refuses_device("matmul", x)


def run(x: Tensor, weights: Tensor, offsets: Tensor, inverse: Tensor, order: Tensor, up: Stack, down: Stack) -> Tensor:
    rows = inverse.numel()
    hidden = torch.empty(rows, rows_of(up), dtype=x.dtype, device=x.device)
    run_groups(x, up, Groups(offsets, order, inverse.shape[1]), hidden, relu2=True)
    y = torch.empty(rows, x.shape[1], dtype=torch.float32, device=x.device)
    run_groups(hidden, down, Groups(offsets), y)
    return (reference if triton.refuses(y) else triton).combine(y, order, inverse, weights, x.dtype)
