"""The Triton kernels of the parts, four launches; the host reads nothing of the routing back."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops.grouped_matmul import triton as grouped_matmul
from nvfp4_kernels.ops.permute import triton as permute


def refuses(
    x: Tensor, weights: Tensor, offsets: Tensor, inverse: Tensor, order: Tensor, up: Stack, down: Stack
) -> str | None:
    return grouped_matmul.refuses(Stack(x), up, offsets, x.dtype) or grouped_matmul.refuses(
        Stack(x), down, offsets, x.dtype
    )


def run(x: Tensor, weights: Tensor, offsets: Tensor, inverse: Tensor, order: Tensor, up: Stack, down: Stack) -> Tensor:
    token = torch.div(order, inverse.shape[1], rounding_mode="floor")
    hidden = grouped_matmul.multiply_rows(Stack(x), up, offsets, x.dtype, token, squared=True)
    y = grouped_matmul.run(Stack(hidden), down, offsets, torch.float32)
    return permute.combine(y, order, inverse, weights, x.dtype)
