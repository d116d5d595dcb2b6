"""y = max(x, 0)^2 * w and its derivatives 2 max(x, 0) w dy and <max(x, 0)^2, dy>; only x (and w) is kept for backward."""

import torch
from torch import Tensor


def refuses(x: Tensor, weights: Tensor | None) -> str | None:
    return None


def run(x: Tensor, weights: Tensor | None) -> Tensor:
    return _Relu2.apply(x, weights)


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weights)
        r = torch.relu(x)
        return r.mul_(r) if weights is None else (r * weights[:, None]).mul_(r).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        x, weights = ctx.saved_tensors
        r = torch.relu(x)
        if weights is None:
            return r.mul_(dy).mul_(2), None
        dr2 = r * dy  # <r^2, dy> = <r, r dy>
        dweights = torch.linalg.vecdot(r.to(weights.dtype), dr2.to(weights.dtype)) if ctx.needs_input_grad[1] else None
        return (dr2 * (2 * weights)[:, None]).to(x.dtype), dweights
