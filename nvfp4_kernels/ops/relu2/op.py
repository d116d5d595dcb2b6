"""relu2: the squared ReLU between an MLP's two matrices, with the routing weight of each row on request."""

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import float_operand, floating_point, require
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._library import register_differentiable, unobserved


def relu2(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """relu(x)^2, times weights[row] where given.

    x: [..., features], floating point, any strides. weights: float [rows] for x [rows, features]: the probability that
    training puts before an expert's second matrix.
    Returns the shape and dtype of x; differentiable in both. The product is formed in fp32 and rounded once.
    Raises TypeError or ValueError naming the argument.
    Source: So et al. 2021 (Primer); placement of the weight as Megatron-LM's weighted_squared_relu.
    """
    floating_point("x", x)
    if weights is not None:
        require(x.dim() == 2, "x", f"{x.dim()} dimensions", "2, [rows, features], with weights")
        float_operand("weights", weights, x.shape[:1], x.device)
    return (_run if unobserved(x) else torch.ops.nvfp4.relu2)(x, weights)


def _run(x: Tensor, weights: Tensor | None) -> Tensor:
    return select("relu2", x, weights).run(x, weights)


def _backward(dy: Tensor, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return select("relu2", x, weights).backward(dy, x, weights)


def _fake(x: Tensor, weights: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register_differentiable("relu2", "Tensor x, Tensor? weights", 1, _run, _fake, _backward, 2)
