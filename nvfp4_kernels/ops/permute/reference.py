"""Gathers in both directions, forward and backward: the permutation is known both ways, so nothing is ever scattered."""

import torch
from torch import Tensor


def refuses(x: Tensor, order: Tensor, inverse: Tensor) -> str | None:
    return None


def run(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return _Permute.apply(x, order, inverse)


def combine(y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
    return _Combine.apply(y, order, inverse, weights)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order // inverse.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        return _sum_slots(dy, *ctx.saved_tensors), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(None if weights is None else y, order, inverse, weights)
        return _sum_slots(y, inverse, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor):
        y, order, inverse, weights = ctx.saved_tensors
        rows = dout.index_select(0, order // inverse.shape[1])
        if weights is None:
            return rows, None, None, None
        dy = (rows * weights.reshape(-1)[order][:, None]).to(dout.dtype)
        dweights = torch.linalg.vecdot(rows.to(weights.dtype), y.to(weights.dtype))[inverse]
        return dy, None, None, dweights


def _sum_slots(y: Tensor, inverse: Tensor, weights: Tensor | None = None) -> Tensor:
    """[tokens, features]: the sum over choices of y[inverse[token, choice]] (* weights[token, choice])."""
    total = None
    for choice in range(inverse.shape[1]):
        rows = y.index_select(0, inverse[:, choice])
        if weights is not None:
            rows = rows * weights[:, choice, None]
        total = rows if total is None else total + rows
    return total.to(y.dtype)
