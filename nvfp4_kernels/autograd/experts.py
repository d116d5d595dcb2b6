"""The experts over tokens sorted by expert: two matrices each and the squared ReLU between them, all experts in one product.

Each matrix as in autograd/linear, but that each expert's weight and its part of the column forms have global scales of their
own, and the tokens' row form one. The squared ReLU is taken, and differentiated, where the products leave their sums. Where the
experts gather the tokens themselves, the products do it as they read them, plain or as the row form, which is made once a
token; the column form is made of gathered rows, since a token's copies must not share noise there. Backward keeps codes alone
of what is quantized, and of what is not the tokens, ungathered, and the hidden values before the squared ReLU, which is taken
again. Two autograd functions, so that what the second kept is free when the first makes its gradients. The host reads nothing
back.
"""

import torch
from torch import Tensor

from nvfp4_kernels.autograd.linear import FORWARD, advance, autocast, draws, later, operands, own
from nvfp4_kernels.autograd.saved import save, saved
from nvfp4_kernels.formats.groups import Columns, Stack
from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.ops._check import float_operand, floating_point, index_tensor, require
from nvfp4_kernels.ops.grouped_matmul.op import grouped_matmul
from nvfp4_kernels.ops.grouped_relu2.op import grouped_relu2, grouped_relu2_backward
from nvfp4_kernels.ops.permute.op import permute, sum_slots
from nvfp4_kernels.ops.quantize.op import Quantized, quantize_groups, quantize_pair, quantize_stack
from nvfp4_kernels.ops.route.op import Routing, check_routing
from nvfp4_kernels.recipe import HIGH, LinearRecipe, Recipe, get_recipe

Forms = tuple[Stack, Stack]
AnyRecipe = Recipe | LinearRecipe | str


def experts(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    groups: Routing | Tensor,
    weights: Tensor | None = None,
    recipes: AnyRecipe | tuple[AnyRecipe, AnyRecipe] = HIGH,
    noises: tuple[Tensor | None, Tensor | None] = (None, None),
    forms: tuple[Forms | None, Forms | None] = (None, None),
) -> Tensor:
    """y[row] = down[e] @ (relu(up[e] @ x[row])^2 * weights[row]) for the expert e of each row.

    x: floating point; under torch.autocast cast to its dtype first. up: [experts, width, in]. down: [experts, in, width].
    groups: int64 [experts + 1] on x's device, expert e having the rows groups[e] to groups[e + 1] of x [rows, in]; or a
        Routing, x then being the tokens [tokens, in], which are read as nk.permute gathers them, but not copied.
    weights: float [rows], put before the second matrix as training does, or None.
    recipes: as nk.linear's recipe, for both matrices or a pair for up and down. noises, forms: pairs of them, as there.
    Returns [rows, in] of x's dtype, sorted by expert; differentiable in x, up, down and weights. Nothing is read back to
    the host. Raises TypeError or ValueError naming the argument.
    """
    require(isinstance(groups, (Routing, Tensor)), "groups", type(groups).__name__, "a Routing or a tensor", TypeError)
    floating_point("x", x)
    require(x.dim() == 2, "x", f"{x.dim()} dimensions", "2, [rows, in]")
    routed = isinstance(groups, Routing)
    if routed:
        check_routing(groups)
    offsets, order, inverse = (groups.offsets, groups.order, groups.inverse) if routed else (groups, None, None)
    index_tensor("groups", offsets, x.device)
    count, tokens, size = offsets.shape[0] - 1, len(inverse) if routed else len(x), x.shape[1]
    if len(x) != tokens:  # no words are put together for what is right, here and below
        require(False, "x", f"shape {list(x.shape)}", f"[{tokens}, in], as routed")
    floating_point("up", up)
    if up.dim() != 3 or up.shape[2] != size:
        require(False, "up", f"shape {list(up.shape)}", f"[experts, width, {size}]")
    require(count == len(up), "groups", f"{count} experts", f"{len(up)}, as many as the weight has")
    float_operand("down", down, (count, size, up.shape[1]), x.device)
    x = autocast(x)
    pair = recipes if isinstance(recipes, tuple) else (recipes, recipes)
    recipes = [get_recipe(recipe).default for recipe in pair]
    noises = [_noise(*both, x.device) for both in zip(noises, recipes, strict=True)]
    trained = [torch.is_grad_enabled() and weight.requires_grad for weight in (up, down)]
    (first, second), (up_form, down_form) = recipes, forms
    squared = _spared(second.fprop_x, second.wgrad_x if trained[1] else None)
    gradient = _spared(first.dgrad_dy, first.wgrad_dy if trained[0] else None)
    routing = offsets, order, inverse
    h, squares, most = _Up.apply(x, up, weights, *routing, first, noises[0], up_form, trained[0], squared)
    return _Down.apply(
        h, squares, most, down, weights, offsets, second, noises[1], down_form, trained[1], squared[0], gradient
    )


def quantize_experts(weight: Tensor, recipe: LinearRecipe, noise: Tensor | None = None) -> Forms:
    """Both forms of all experts' matrices, weight [experts, out, in]: made once a step, as autograd.linear.quantize_weight."""
    after_x = later(noise, draws(recipe.fprop_x, recipe.wgrad_x))
    return quantize_stack(weight.detach(), recipe.fprop_w, recipe.dgrad_w, after_x)


def sorted_rows(x: Tensor, groups: Routing | Tensor) -> tuple[Tensor, Tensor]:
    """What `experts` is given as rows sorted by expert, and their offsets."""
    return (permute(x, groups), groups.offsets) if isinstance(groups, Routing) else (x, groups)


class _Up(torch.autograd.Function):
    """The hidden values; their squares, which _Down reads and has no gradient for; and room for the amaxes of these, if asked
    for, in the place of whose gradient _Down gives those of the hidden values' gradient."""

    @staticmethod
    def forward(ctx, x, weight, weights, offsets, order, inverse, recipe, noise, forms, trained, spared):
        # x [tokens or rows, in], weight [experts, width, in], weights [rows] or None
        ctx.set_materialize_grads(False)
        x_row, x_col = _forms_of_x(x, offsets, order, inverse, recipe, own(noise), trained)
        w_row, w_col = forms or _forms_of_w(weight, recipe, noise, x.dtype)
        # a plain weight is kept as the parameter that it is, not as the copy in x's dtype
        save(ctx, offsets, order, inverse, w_col if recipe.dgrad_w else weight, x_col)
        ctx.recipe, ctx.noise, ctx.dtype = recipe, noise, weight.dtype
        h, squares, most = grouped_relu2(x_row, w_row, offsets, weights, x.dtype, tokens_of(order, inverse), *spared)
        ctx.mark_non_differentiable(squares)
        most = offsets.new_empty(3, len(offsets) - 1, dtype=torch.float32) if most is None else most
        return h, squares, most  # [rows, width] twice, [3, experts]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh, _, most):
        offsets, order, inverse, w_col, x_col = saved(ctx)
        recipe, dx, dw = ctx.recipe, None, None
        noise = own(ctx.noise, draws(*operands(recipe)[:FORWARD]))
        col = None if x_col is None else recipe.wgrad_dy
        dh_row, dh_col = _quantized(dh, offsets, recipe.dgrad_dy, col, noise, most)
        if ctx.needs_input_grad[0]:
            # dh [rows, width] @ w_col [in, width].T
            dx = grouped_matmul(dh_row, _columns_of_w(w_col, recipe, dh.dtype), offsets, dh.dtype)
            dx = dx if order is None else sum_slots(dx, order, inverse)
        if x_col is not None:
            # dh_col [width, rows] @ x_col [in, rows].T
            x_col, tokens = (x_col, None) if recipe.wgrad_x else (x_col.t(), tokens_of(order, inverse))
            dw = grouped_matmul(dh_col, x_col, offsets, ctx.dtype, tokens)
        advance(ctx.noise, recipe)
        return dx, dw, *[None] * 9


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, squares, most, weight, weights, offsets, recipe, noise, forms, trained, spared, gradient):
        # h, squares [rows, width], weight [experts, in, width], weights [rows] or None
        col = recipe.wgrad_x if trained else None
        a_row, a_col = _quantized(squares, offsets, recipe.fprop_x, col, own(noise), most if spared else None)
        w_row, w_col = forms or _forms_of_w(weight, recipe, noise, h.dtype)
        save(ctx, offsets, w_col if recipe.dgrad_w else weight, a_col if col else None, h, weights)
        ctx.recipe, ctx.noise, ctx.dtype, ctx.trained, ctx.gradient = recipe, noise, weight.dtype, trained, gradient
        return grouped_matmul(a_row, w_row, offsets, h.dtype)  # [rows, in]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        offsets, w_col, a_col, h, weights = saved(ctx)
        recipe, dw = ctx.recipe, None
        noise = own(ctx.noise, draws(*operands(recipe)[:FORWARD]))
        col = recipe.wgrad_dy if ctx.trained else None
        dy_row, dy_col = _quantized(dy.contiguous(), offsets, recipe.dgrad_dy, col, noise)
        again = ctx.trained and a_col is None  # in high precision the squares are taken again
        # dy [rows, in] @ w_col [width, in].T
        dh, dweights, a, most = grouped_relu2_backward(
            dy_row, _columns_of_w(w_col, recipe, dy.dtype), offsets, h, weights, again, *ctx.gradient
        )
        if ctx.trained:
            # dy_col [in, rows] @ a_col [width, rows].T
            dw = grouped_matmul(dy_col, a.t() if again else a_col, offsets, ctx.dtype)
        advance(ctx.noise, recipe)
        return dh, None, most, dw, dweights, *[None] * 7


def _noise(noise: Tensor | None, recipe: LinearRecipe, device: torch.device) -> Tensor | None:
    if noise is None and draws(*operands(recipe)):
        return torch.randint(0, 1 << 62, (2,), dtype=torch.int64).to(device)
    return noise


def _spared(row: QuantSpec | None, col: QuantSpec | None) -> tuple[bool, int | None]:
    """grouped_relu2's amax and signs: what, known, spares these forms the read that finds it. That of rotated rows is found by
    nobody else."""
    forms = [spec for spec in (row, col) if spec and spec.format == "nvfp4"]
    return len(forms) > 0 and (row is None or row.hadamard is None), None if col is None else col.hadamard


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


def _quantized(x, offsets, row, col, noise, amax=None) -> tuple[Quantized | Tensor, Columns | Tensor]:
    """quantize_groups, but that high precision is any."""
    return quantize_groups(x, offsets, row, col, noise, amax) if row or col else (x, x.t())


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
