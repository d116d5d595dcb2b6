"""Gathers in both directions, forward and backward: the permutation is known both ways, so nothing is ever scattered."""

import torch
from torch import Tensor


def refuses(x: Tensor) -> str | None:
    return None


def run(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return x.index_select(0, order // inverse.shape[1])


def combine(
    y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """[tokens, features] of `dtype`, or y's: the sum over choices of y[inverse[token, choice]] (* weights[token, choice])."""
    total = None
    for choice in range(inverse.shape[1]):
        rows = y.index_select(0, inverse[:, choice]).to(torch.promote_types(y.dtype, torch.float32))
        if weights is not None:
            rows = rows * weights[:, choice, None]
        total = rows if total is None else total + rows
    return total.to(dtype or y.dtype)


def combine_backward(dout: Tensor, y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y and weights."""
    rows = run(dout, order, inverse)
    dy = (rows * weights.reshape(-1)[order][:, None]).to(dout.dtype)
    dweights = torch.linalg.vecdot(rows.to(weights.dtype), y.to(weights.dtype))[inverse]
    return dy, dweights
