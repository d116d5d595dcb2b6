"""The experts' two matrices over tokens sorted by expert: a linear layer each, all of them in one product.

As in autograd/linear, but that each expert's weight and its part of the column forms have global scales of their own, and the
tokens' row form one. Where the experts gather the tokens themselves, the products do it as they read them, plain or as the row
form, which is made once a token; the column form is made of gathered rows, since a token's copies must not share noise there.
Backward keeps codes alone of what is quantized, and of what is not the tokens, ungathered, and the hidden values before the
squared ReLU, which is taken again. The host reads nothing back.
"""

import torch
from torch import Tensor

from nvfp4_kernels.autograd.linear import FORWARD, advance, draws, later, operands
from nvfp4_kernels.autograd.saved import save, saved
from nvfp4_kernels.formats.groups import Columns, Stack
from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ops.grouped_matmul.op import grouped_matmul
from nvfp4_kernels.ops.permute.op import permute, sum_slots
from nvfp4_kernels.ops.quantize.op import Quantized, quantize_groups, quantize_pair, quantize_stack
from nvfp4_kernels.ops.relu2.op import relu2
from nvfp4_kernels.ops.route.op import Routing
from nvfp4_kernels.recipe import HIGH, LinearRecipe

Forms = tuple[Stack, Stack]


def experts(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    groups: Routing | Tensor,
    weights: Tensor | None = None,
    recipes: tuple[LinearRecipe, LinearRecipe] = (HIGH, HIGH),
    noises: tuple[Tensor | None, Tensor | None] = (None, None),
    forms: tuple[Forms | None, Forms | None] = (None, None),
) -> Tensor:
    """y[row] = down[e] @ (relu(up[e] @ x[row])^2 * weights[row]) for the expert e of each row.

    up: [experts, width, in]. down: [experts, in, width].
    groups: int64 [experts + 1] on x's device, expert e having the rows groups[e] to groups[e + 1] of x [rows, in]; or a
        Routing, x then being the tokens [tokens, in], which are read as nk.permute gathers them, but not copied.
    weights: float [rows], put before the second matrix as training does, or None. recipes, noises, forms: of up and down.
    Returns [rows, in] of x's dtype, sorted by expert; differentiable in x, up, down and weights. Nothing is read back to
    the host. Raises TypeError or ValueError naming the argument.
    """
    hidden = expert_linear(x, up, groups, recipes[0], noises[0], forms[0])
    offsets = groups.offsets if isinstance(groups, Routing) else groups
    return expert_linear(hidden, down, offsets, recipes[1], noises[1], forms[1], squared=True, weights=weights)


def expert_linear(
    x: Tensor,
    weight: Tensor,
    groups: Routing | Tensor,
    recipe: LinearRecipe = HIGH,
    noise: Tensor | None = None,
    forms: Forms | None = None,
    *,
    squared: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """y[row] = weight[e] @ x[row]: x [rows, in] sorted by expert, or the tokens; weight [experts, out, in]; y [rows, out].

    squared: read relu2(x, weights) in the place of x, with x sorted by expert.
    """
    require(isinstance(groups, (Routing, Tensor)), "groups", type(groups).__name__, "a Routing or a tensor", TypeError)
    require(x.dim() == 2, "x", f"{x.dim()} dimensions", "2, [rows, in]")
    routed = isinstance(groups, Routing)
    offsets, order, inverse = (groups.offsets, groups.order, groups.inverse) if routed else (groups, None, None)
    count, tokens = offsets.shape[0] - 1, len(inverse) if routed else len(x)
    require(count == len(weight), "groups", f"{count} experts", f"{len(weight)}, as many as the weight has")
    require(len(x) == tokens, "x", f"shape {list(x.shape)}", f"[{tokens}, in], as routed")
    if noise is None and draws(*operands(recipe)):
        noise = torch.randint(0, 1 << 62, (2,), dtype=torch.int64).to(x.device)
    wanted = torch.is_grad_enabled() and weight.requires_grad
    routing = offsets, order, inverse
    return _ExpertLinear.apply(x, weight, weights, squared, *routing, recipe, noise, forms, wanted)


def quantize_experts(weight: Tensor, recipe: LinearRecipe, noise: Tensor | None = None) -> Forms:
    """Both forms of all experts' matrices, weight [experts, out, in]: made once a step, as autograd.linear.quantize_weight."""
    after_x = later(noise, draws(recipe.fprop_x, recipe.wgrad_x))
    return quantize_stack(weight.detach(), recipe.fprop_w, recipe.dgrad_w, after_x)


def sorted_rows(x: Tensor, groups: Routing | Tensor) -> tuple[Tensor, Tensor]:
    """What `experts` is given as rows sorted by expert, and their offsets."""
    return (permute(x, groups), groups.offsets) if isinstance(groups, Routing) else (x, groups)


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, weights, squared, offsets, order, inverse, recipe, noise, forms, wanted):
        # x [tokens or rows, in], weight [experts, out, in], weights [rows] or None
        read = relu2(x, weights) if squared else x
        x_row, x_col = _forms_of_x(read, offsets, order, inverse, recipe, noise, wanted)
        w_row, w_col = forms or _forms_of_w(weight, recipe, noise, x.dtype)
        again = squared and isinstance(x_col, Tensor)  # in high precision what is squared is read again
        kept = (x, weights) if squared else (None, None)
        # a plain weight is kept as the parameter that it is, not as the copy in x's dtype
        save(ctx, offsets, order, inverse, w_col if recipe.dgrad_w else weight, None if again else x_col, *kept)
        ctx.recipe, ctx.noise, ctx.dtype, ctx.squared, ctx.again = recipe, noise, weight.dtype, squared, again
        return grouped_matmul(x_row, w_row, offsets, x.dtype, tokens_of(order, inverse))  # [rows, out]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        offsets, order, inverse, w_col, x_col, x, weights = saved(ctx)
        recipe, dx, dw, dweights = ctx.recipe, None, None, None
        x_col = relu2(x, weights) if ctx.again else x_col
        noise = later(ctx.noise, draws(*operands(recipe)[:FORWARD]))
        col = None if x_col is None else recipe.wgrad_dy
        dy_row, dy_col = _quantized(dy.contiguous(), offsets, recipe.dgrad_dy, col, noise)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            # dy [rows, out] @ w_col [experts, in, out].T
            dx = grouped_matmul(dy_row, _columns_of_w(w_col, recipe, dy.dtype), offsets, dy.dtype)
            dx = dx if order is None else sum_slots(dx, order, inverse)
            if ctx.squared:
                dx, dweights = torch.ops.nvfp4.relu2_backward(dx, x, weights)
        if x_col is not None:
            # dy_col [out, rows] @ x_col [in, rows].T
            x_col, tokens = (x_col, None) if recipe.wgrad_x else (x_col.t(), tokens_of(order, inverse))
            dw = grouped_matmul(dy_col, x_col, offsets, ctx.dtype, tokens)
        advance(ctx.noise, recipe)
        return dx, dw, None if weights is None else dweights, *[None] * 8


def _forms_of_x(
    x, offsets, order, inverse, recipe, noise, wanted
) -> tuple[Quantized | Tensor, Columns | Tensor | None]:
    """The row form of x, gathered by nobody yet; of what wgrad needs the column form of the rows, or x itself where it is in
    high precision."""
    col = recipe.wgrad_x if wanted else None  # wanted: the weight's gradient
    if order is None:
        x_row, x_col = _quantized(x, offsets, recipe.fprop_x, col, noise)
        return x_row, x_col if col else x if wanted else None
    x_row = quantize_pair(x, recipe.fprop_x, None, noise)[0] if recipe.fprop_x else x
    if not col:
        return x_row, x if wanted else None
    after_row = later(noise, draws(recipe.fprop_x))
    return x_row, quantize_groups(x, offsets, None, col, after_row, rows=tokens_of(order, inverse))[1]


def _quantized(x, offsets, row, col, noise) -> tuple[Quantized | Tensor, Columns | Tensor]:
    """quantize_groups, but that high precision is any."""
    return quantize_groups(x, offsets, row, col, noise) if row or col else (x, x.t())


def tokens_of(order: Tensor | None, inverse: Tensor | None) -> Tensor | None:
    """The token of each row, where x is the tokens."""
    return None if order is None else torch.div(order, inverse.shape[1], rounding_mode="floor")


def _columns_of_w(w_col: Stack | Tensor, recipe: LinearRecipe, dtype: torch.dtype) -> Stack | Tensor:
    if recipe.dgrad_w:
        return w_col
    return (w_col if recipe.quantized else w_col.to(dtype)).transpose(1, 2)


def _forms_of_w(weight: Tensor, recipe: LinearRecipe, noise: Tensor | None, dtype: torch.dtype) -> Forms:
    if recipe.quantized:
        return quantize_experts(weight, recipe, noise)
    return Stack(weight.to(dtype)), Stack(weight)
