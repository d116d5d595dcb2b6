"""The Triton kernels of the parts, five launches and one more for 16-bit x; the host reads nothing of the routing back."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops.grouped_matmul import triton as grouped_matmul
from nvfp4_kernels.ops.permute import triton as permute
from nvfp4_kernels.ops.relu2 import triton as relu2


def refuses(
    x: Tensor, weights: Tensor, offsets: Tensor, inverse: Tensor, order: Tensor, up: Stack, down: Stack
) -> str | None:
    return grouped_matmul.refuses(Stack(x), up, offsets, x.dtype) or grouped_matmul.refuses(
        Stack(x), down, offsets, x.dtype
    )


def run(x: Tensor, weights: Tensor, offsets: Tensor, inverse: Tensor, order: Tensor, up: Stack, down: Stack) -> Tensor:
    token = torch.div(order, inverse.shape[1], rounding_mode="floor")
    hidden = relu2.run(grouped_matmul.run(Stack(x), up, offsets, torch.float32, token), None).to(x.dtype)
    y = grouped_matmul.run(Stack(hidden), down, offsets, torch.float32)
    return permute.combine(y, order, inverse, weights, x.dtype)
