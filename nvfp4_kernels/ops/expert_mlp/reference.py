"""The parts one after another: product of gathered rows, squared ReLU, product, weighted sum."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops.grouped_matmul import reference as grouped_matmul
from nvfp4_kernels.ops.permute import reference as permute


def refuses(x: Tensor, weights: Tensor, offsets: Tensor, inverse: Tensor, order: Tensor, up: Stack, down: Stack):
    return None


def run(x: Tensor, weights: Tensor, offsets: Tensor, inverse: Tensor, order: Tensor, up: Stack, down: Stack) -> Tensor:
    token = order // inverse.shape[1]
    hidden = grouped_matmul.run(Stack(x), up, offsets, torch.float32, token).relu_().square_().to(x.dtype)
    y = grouped_matmul.run(Stack(hidden), down, offsets, torch.float32)
    return permute.combine(y, order, inverse, weights, x.dtype)
