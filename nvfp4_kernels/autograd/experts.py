"""The experts' two matrices over tokens sorted by expert: each expert is a linear layer of its own, with its own global scales.

Forward and backward are those of autograd/linear, expert after expert, written into one tensor; an expert without tokens
costs nothing and gets a gradient of zero.
"""

from itertools import accumulate

import torch
from torch import Tensor

from nvfp4_kernels.autograd.linear import FORWARD, Forms, advance, draws, later, operands, quantize_weight
from nvfp4_kernels.autograd.saved import save, saved
from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ops.grouped_matmul.op import grouped_matmul
from nvfp4_kernels.ops.matmul.op import matmul
from nvfp4_kernels.ops.quantize.op import quantize_pair
from nvfp4_kernels.ops.relu2.op import relu2
from nvfp4_kernels.recipe import HIGH, LinearRecipe


def experts(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    sizes: list[int],
    weights: Tensor | None = None,
    recipes: tuple[LinearRecipe, LinearRecipe] = (HIGH, HIGH),
    noises: tuple[Tensor | None, Tensor | None] = (None, None),
    forms: tuple[list[Forms] | None, list[Forms] | None] = (None, None),
) -> Tensor:
    """y[row] = down[e] @ (relu(up[e] @ x[row])^2 * weights[row]) for the expert e of each row.

    x: [rows, in], sorted by expert. up: [experts, width, in]. down: [experts, in, width]. sizes: rows of each expert.
    weights: float [rows], put before the second matrix as training does, or None. recipes, noises, forms: of up and down.
    Returns [rows, in] of x's dtype; differentiable in x, up, down and weights. Raises ValueError naming the argument.
    """
    require(
        len(sizes) == up.shape[0] and sum(sizes) == x.shape[0],
        "sizes",
        sizes,
        f"{up.shape[0]} sizes that sum to {x.shape[0]}",
    )
    hidden = expert_linear(x, up, sizes, recipes[0], noises[0], forms[0])
    return expert_linear(relu2(hidden, weights), down, sizes, recipes[1], noises[1], forms[1])


def expert_linear(
    x: Tensor,
    weight: Tensor,
    sizes: list[int],
    recipe: LinearRecipe = HIGH,
    noise: Tensor | None = None,
    forms: list[Forms] | None = None,
) -> Tensor:
    """y[row] = weight[e] @ x[row]: x [rows, in] sorted by expert, weight [experts, out, in], y [rows, out]."""
    if not recipe.quantized:
        return _Plain.apply(x, weight, torch.tensor([0, *accumulate(sizes)], device=x.device))
    if noise is None and draws(*operands(recipe)):
        noise = torch.randint(0, 1 << 62, (2,), dtype=torch.int64).to(x.device)
    return _Quantized.apply(x, weight, sizes, recipe, noise, forms)


def quantize_experts(weight: Tensor, recipe: LinearRecipe, noise: Tensor | None = None) -> list[Forms]:
    """The forms of each expert's matrix, weight [experts, out, in]: made once a step, as autograd.linear.quantize_weight."""
    weight = weight.detach()
    return [quantize_weight(weight[e], recipe, _noise_of(noise, recipe, e)) for e in range(weight.shape[0])]


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, offsets):
        ctx.save_for_backward(x, weight, offsets)
        return grouped_matmul(x, weight.to(x.dtype), offsets)  # [rows, out] = x [rows, in] @ w [experts, out, in].T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, offsets = ctx.saved_tensors
        dx = grouped_matmul(dy, weight.to(x.dtype).transpose(1, 2), offsets)  # [rows, in] = dy [rows, out] @ w
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        return dx, grouped_matmul(dy.t(), x.t(), offsets, weight.dtype), None  # [experts, out, in] = dy.T @ x


class _Quantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, sizes, recipe, noise, forms):
        forms = forms or quantize_experts(weight, recipe, noise)
        y, kept = x.new_empty(x.shape[0], weight.shape[1]), []
        for e, rows in _spans(sizes):
            x_row, x_col = quantize_pair(x[rows], recipe.fprop_x, recipe.wgrad_x, _noise_of(noise, recipe, e))
            matmul(x_row, forms[e][0], out=y[rows])
            kept += [x_col, forms[e][1]]
        save(ctx, *kept)
        ctx.sizes, ctx.recipe, ctx.noise, ctx.shape, ctx.dtype = sizes, recipe, noise, weight.shape, weight.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        recipe, kept, dy = ctx.recipe, saved(ctx), dy.contiguous()
        dx = dy.new_empty(dy.shape[0], ctx.shape[2])
        dw = torch.zeros(ctx.shape, dtype=ctx.dtype, device=dy.device) if ctx.needs_input_grad[1] else None
        for (e, rows), x_col, w_col in zip(_spans(ctx.sizes), kept[::2], kept[1::2], strict=True):
            noise = later(_noise_of(ctx.noise, recipe, e), draws(*operands(recipe)[:FORWARD]))
            dy_row, dy_col = quantize_pair(dy[rows], recipe.dgrad_dy, recipe.wgrad_dy, noise)
            matmul(dy_row, w_col, out=dx[rows])
            if dw is not None:
                matmul(dy_col, x_col, out=dw[e])
        for _ in range(ctx.shape[0]):
            advance(ctx.noise, recipe)
        return dx, dw, None, None, None, None


def _noise_of(noise: Tensor | None, recipe: LinearRecipe, expert: int) -> Tensor | None:
    """Each expert draws from a stretch of offsets of its own, as long as one forward and backward needs."""
    return later(noise, expert * draws(*operands(recipe)))


def _spans(sizes: list[int]):
    """(expert, its rows) for the experts that have any."""
    start = 0
    for e, size in enumerate(sizes):
        if size:
            yield e, slice(start, start + size)
        start += size
