"""y = x W^T with each of the three GEMMs' operands in the format that the recipe gives it.

Forward keeps what backward needs and no more: the column forms of x and W, quantized, never x itself; of a weight without
gradient that of W alone.
"""

import torch
from torch import Tensor

from nvfp4_kernels.autograd.plain import dense
from nvfp4_kernels.autograd.saved import Operand, save, saved
from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.formats.tensor import QuantizedTensor
from nvfp4_kernels.ops._check import float_tensor, require, same_device
from nvfp4_kernels.ops._device import rank
from nvfp4_kernels.ops._library import transformed
from nvfp4_kernels.ops.matmul.op import matmul
from nvfp4_kernels.ops.quantize.op import quantize_pair
from nvfp4_kernels.recipe import LinearRecipe, Recipe, get_recipe, nvfp4

FORWARD = 4
Forms = tuple[Operand, Operand]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, noise, recipe, weight_forms, wanted):
        # x [tokens, in], weight [out, in]
        x_row, x_col = quantize_pair(x, recipe.fprop_x, recipe.wgrad_x if wanted else None, own(noise))
        w_row, w_col = weight_forms or quantize_weight(weight, recipe, noise)
        save(ctx, x_col if wanted else None, w_col)  # wanted: the weight's gradient
        ctx.recipe, ctx.noise, ctx.dtypes = recipe, noise, (weight.dtype, None if bias is None else bias.dtype)
        return matmul(x_row, w_row, x.dtype, bias=bias)  # [tokens, out]

    @staticmethod
    def backward(ctx, dy):
        _refuse_second_derivative()
        x_col, w_col = saved(ctx)
        recipe, (w_dtype, bias_dtype) = ctx.recipe, ctx.dtypes
        noise = own(ctx.noise, draws(*operands(recipe)[:FORWARD]))
        wants_dx, wants_dw, wants_db = ctx.needs_input_grad[:3]
        dy_row, dy_col = quantize_pair(dy, recipe.dgrad_dy, recipe.wgrad_dy if wants_dw else None, noise)
        dx = matmul(dy_row, w_col, dy.dtype) if wants_dx else None  # dy [tokens, out] @ w_col [in, out].T
        dw = matmul(dy_col, x_col, w_dtype) if wants_dw else None  # dy_col [out, tokens] @ x_col [in, tokens].T
        db = dy.sum(0, dtype=torch.float32).to(bias_dtype) if wants_db else None
        advance(ctx.noise, recipe)
        return dx, dw, db, *[None] * 4


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    recipe: "Recipe | LinearRecipe | str" = nvfp4,
    *,
    noise: Tensor | None = None,
    weight_forms: Forms | None = None,
) -> Tensor:
    """y = x @ weight.T + bias, forward and backward by `recipe`; a drop-in for torch.nn.functional.linear.

    x: [..., in], bf16, fp16 or fp32; under torch.autocast it is cast to autocast's dtype first. y [..., out] has its dtype.
    weight: [out, in]; the fp32 master weight is the usual case. Its gradient has its dtype, summed in fp32.
    bias: [out] or None.
    recipe: a LinearRecipe, or a Recipe or its name ("nvfp4", "nemotron3", "bf16") of which the default is used.
    noise: int64 [2] (seed, offset) for stochastic rounding; backward advances the offset in place, so that the next
        step rounds afresh and a checkpointed forward, run again, rounds alike. None draws a seed from torch's generator.
        Where torch.distributed runs, each rank rounds x and dy by its own noise, that of the seed plus its number.
    weight_forms: the result of quantize_weight for this very weight, to quantize once a step and not once a micro-batch.

    Raises TypeError or ValueError naming the argument. A second derivative (create_graph=True) is refused, since
    quantization is piecewise constant, and so are the transforms of torch.func.
    Source: "Pretraining LLMs with NVFP4", section 4 and figure 5.
    """
    recipe = recipe if isinstance(recipe, LinearRecipe) else get_recipe(recipe).default
    _check(x, weight, bias)
    x = autocast(x)
    if not recipe.quantized or x.numel() == 0:
        return dense(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if not torch.compiler.is_compiling() and transformed():
        raise RuntimeError("nk.linear: got a transform of torch.func; allowed: torch.autograd, or recipe='bf16'")
    if noise is None and draws(*operands(recipe)):
        noise = torch.randint(0, 1 << 62, (2,), dtype=torch.int64).to(x.device)
    wanted = torch.is_grad_enabled() and weight.requires_grad
    y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, noise, recipe, weight_forms, wanted)
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))  # nobody else has y; views FSDP2 warns of


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that torch.autocast, where it is on, gives products; fp64 stays, as torch's does."""
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def quantize_weight(weight: Tensor, recipe: LinearRecipe, noise: Tensor | None = None) -> Forms:
    """The two forms of weight [out, in] that the GEMMs read: row form for fprop, column form [in, out] for dgrad."""
    after_x = later(noise, draws(recipe.fprop_x, recipe.wgrad_x))
    return quantize_pair(weight.detach(), recipe.fprop_w, recipe.dgrad_w, after_x)


def draws(*specs: QuantSpec | None) -> int:
    """How many of the operands take a noise offset of their own."""
    return sum(spec is not None and spec.stochastic for spec in specs)


def later(noise: Tensor | None, offsets: int, seeds: int = 0) -> Tensor | None:
    """The noise `offsets` draws further on, of the seed `seeds` further on."""
    if noise is None or not (offsets or seeds):
        return noise
    moved = noise.clone()
    moved[1] += offsets  # nothing travels from the host
    if seeds:
        moved[0] += seeds
    return moved


def own(noise: Tensor | None, offsets: int = 0) -> Tensor | None:
    """The noise `offsets` draws further on that this process rounds activations and gradients by.

    (seed, offset) itself is equal on all ranks that train one model, so that it may be broadcast, and saved by one of them; by
    equal noise their errors would not average out. Weights are rounded by `later`: all ranks compute with the same ones.
    """
    return later(noise, offsets, rank())


def advance(noise: Tensor | None, recipe: LinearRecipe) -> None:
    """Move the offset past everything that one forward and backward drew."""
    total = draws(*operands(recipe))
    if noise is not None and total:
        noise[1] += total


def operands(recipe: LinearRecipe) -> tuple[QuantSpec | None, ...]:
    """In the order in which they draw: the first FORWARD of them in forward."""
    return recipe.fprop_x, recipe.wgrad_x, recipe.fprop_w, recipe.dgrad_w, recipe.dgrad_dy, recipe.wgrad_dy


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "nk.linear: got create_graph=True; allowed: first derivatives, quantization being piecewise constant. "
            "Use recipe='bf16' where a second derivative is needed"
        )


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    float_tensor("x", x)
    allowed = "a torch.Tensor; nk.weight_only multiplies by quantized ones"
    require(not isinstance(weight, QuantizedTensor), "weight", type(weight).__name__, allowed, TypeError)
    float_tensor("weight", weight)
    require(weight.dim() == 2, "weight", f"{weight.dim()} dimensions", "2, [out, in]")
    require(x.dim() >= 1, "x", f"{x.dim()} dimensions", "at least 1, [..., in]")
    require(
        x.shape[-1] == weight.shape[1],
        "x",
        f"last axis {x.shape[-1]}",
        f"{weight.shape[1]}, the weight's input features",
    )
    require(weight.shape[1] > 0, "weight", f"shape {list(weight.shape)}", "at least 1 input feature")
    same_device("weight", weight, x.device)
    if bias is not None:
        float_tensor("bias", bias)
        require(tuple(bias.shape) == (weight.shape[0],), "bias", f"shape {list(bias.shape)}", f"[{weight.shape[0]}]")
        same_device("bias", bias, x.device)
