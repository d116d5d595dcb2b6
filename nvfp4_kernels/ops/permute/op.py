"""permute and unpermute: token rows to rows sorted by expert, and back with each token's rows summed."""

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import float_operand, require, same_device, strided
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._library import register
from nvfp4_kernels.ops.route.op import Routing, check_routing


def permute(x: Tensor, routing: Routing) -> Tensor:
    """Row r of the result is the token of the r-th slot in expert order.

    x: [tokens, features]. routing: of these tokens. Returns [tokens * top_k, features] of x's dtype; differentiable in x.
    Raises TypeError or ValueError naming the argument.
    """
    check_routing(routing)
    tokens, top_k = routing.indices.shape
    strided("x", x)
    require(x.dim() == 2 and x.shape[0] == tokens, "x", f"shape {list(x.shape)}", f"[{tokens}, features], as routed")
    same_device("routing", routing.order, x.device)
    return _Permute.apply(x, routing.order, routing.inverse)


def unpermute(y: Tensor, routing: Routing, weights: Tensor | None = None) -> Tensor:
    """Each token's sum over its slots of y's rows, times weights[token, choice] where given.

    y: [tokens * top_k, features], sorted by expert as `routing` says. weights: float [tokens, top_k] or None.
    Returns [tokens, features] of y's dtype; differentiable in y and weights. The sum over a token's slots runs in a fixed
    order, in fp32 when weighted. Raises TypeError or ValueError naming the argument.
    """
    check_routing(routing)
    tokens, top_k = routing.indices.shape
    strided("y", y)
    require(
        y.dim() == 2 and y.shape[0] == tokens * top_k, "y", f"shape {list(y.shape)}", f"[{tokens * top_k}, features]"
    )
    same_device("routing", routing.order, y.device)
    float_operand("weights", weights, (tokens, top_k), y.device, optional=True)
    return _Unpermute.apply(y, routing.order, routing.inverse, weights)


def gather(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """permute by the parts of a Routing, without gradients: for derivatives of others."""
    return torch.ops.nvfp4.permute(x, order, inverse)


def sum_slots(y: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """unpermute by the parts of a Routing, without weights or gradients."""
    return torch.ops.nvfp4.unpermute(y, order, inverse, None)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return gather(x, order, inverse)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        return sum_slots(dy, *ctx.saved_tensors), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(None if weights is None else y, order, inverse, weights)
        return torch.ops.nvfp4.unpermute(y, order, inverse, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor):
        y, order, inverse, weights = ctx.saved_tensors
        if weights is None:
            return gather(dout, order, inverse), None, None, None
        dy, dweights = torch.ops.nvfp4.unpermute_backward(dout, y, order, inverse, weights)
        return dy, None, None, dweights


def _serving(x: Tensor):
    """The implementation: `run` gathers rows, `combine` sums them by token, `combine_backward` is its derivative."""
    return select("permute", x)


register(
    "permute(Tensor x, Tensor order, Tensor inverse) -> Tensor",
    lambda x, order, inverse: _serving(x).run(x, order, inverse),
    lambda x, order, inverse: x.new_empty(order.shape[0], x.shape[1]),
)
register(
    "unpermute(Tensor y, Tensor order, Tensor inverse, Tensor? weights) -> Tensor",
    lambda y, order, inverse, weights: _serving(y).combine(y, order, inverse, weights),
    lambda y, order, inverse, weights: y.new_empty(inverse.shape[0], y.shape[1]),
)
register(
    "unpermute_backward(Tensor dout, Tensor y, Tensor order, Tensor inverse, Tensor weights) -> (Tensor, Tensor)",
    lambda dout, y, order, inverse, weights: _serving(dout).combine_backward(dout, y, order, inverse, weights),
    lambda dout, y, order, inverse, weights: (y.new_empty(y.shape), weights.new_empty(weights.shape)),
)
