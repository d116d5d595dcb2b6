"""relu2: the squared ReLU between an MLP's two matrices, with the routing weight of each row on request."""

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ops._dispatch import select


def relu2(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """relu(x)^2, times weights[row] where given.

    x: [..., features], floating point, any strides. weights: float [rows] for x [rows, features]: the probability that
    training puts before an expert's second matrix.
    Returns the shape and dtype of x; differentiable in both. The product is formed in fp32 and rounded once.
    Raises TypeError or ValueError naming the argument.
    Source: So et al. 2021 (Primer); placement of the weight as Megatron-LM's weighted_squared_relu.
    """
    require(
        isinstance(x, Tensor) and x.is_floating_point(),
        "x",
        getattr(x, "dtype", type(x).__name__),
        "a floating-point tensor",
        TypeError,
    )
    if weights is not None:
        require(x.dim() == 2, "x", f"{x.dim()} dimensions", "2, [rows, features], with weights")
        require(
            tuple(weights.shape) == x.shape[:1],
            "weights",
            f"shape {list(weights.shape)}",
            f"[{x.shape[0]}], one for each row of x",
        )
        require(torch.is_floating_point(weights), "weights", weights.dtype, "a floating-point tensor", TypeError)
    return select("relu2", x, weights).run(x, weights)
