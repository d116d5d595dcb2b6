"""The model as it is served: weights in the form that decoding reads, made once and not at each token."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvfp4_kernels.autograd.experts import quantize_experts
from nvfp4_kernels.autograd.linear import quantize_weight
from nvfp4_kernels.formats.tensor import NVFP4Tensor
from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.nn.moe import Experts
from nvfp4_kernels.nn.quantized import NVFP4Weight, QuantizedExperts


class PlainLinear(nn.Module):
    """x W^T + b with W of x's dtype, the bits of a row the same alone and among others, in bf16."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = (None if t is None else nn.Parameter(t, False) for t in (weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        # torch multiplies a single row by another kernel, that sums in another order; two cost what one does: the time goes
        # into reading W.
        if x.numel() == x.shape[-1] and x.dtype == torch.bfloat16:
            return F.linear(x.view(1, -1).expand(2, -1), self.weight, self.bias)[:1].view(*x.shape[:-1], -1)
        return F.linear(x, self.weight, self.bias)


def serving(model: nn.Module) -> nn.Module:
    """A copy of a HybridModel in evaluation mode, to decode with; it shares whatever needs no other form.

    Linear layers and experts: where the recipe quantizes nothing, weights of the activations' dtype; where it does, the
    quantized weights that training multiplies with, NVFP4 kept in four bits, MXFP8 decoded to the activations' dtype;
    activations stay in theirs (quantizing them, as training does, takes a scale from the whole batch: what a sequence says
    would depend on its neighbours). Routers, norms, convolutions, A, D and dt_bias stay as they are. Layers that hold
    quantized weights already (nn.quantized) are shared.
    """
    dtype = model.config.dtype
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}  # shared by the copy
    table = model.backbone.embeddings.weight
    memo[id(table)] = nn.Parameter(table.detach().to(dtype), False)
    made = copy.deepcopy(model, memo).eval()
    for name, module in list(made.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, Linear):
            setattr(made.get_submodule(parent), child, _linear(module, dtype))
        elif isinstance(module, Experts):
            setattr(made.get_submodule(parent), child, _experts(module, dtype))
    return made


@torch.no_grad()
def _linear(module: Linear, dtype: torch.dtype) -> nn.Module:
    bias = None if module.bias is None else module.bias.to(dtype)
    form = quantize_weight(module.weight, module.recipe, module.noise)[0] if module.recipe.quantized else module.weight
    return (
        NVFP4Weight.from_tensors(form, bias)
        if isinstance(form, NVFP4Tensor)
        else PlainLinear(_plain(form, dtype), bias)
    )


@torch.no_grad()
def _experts(module: Experts, dtype: torch.dtype) -> nn.Module:
    stacks = []
    for part, weight, noise in (
        ("up_proj", module.up_proj, module.up_noise),
        ("down_proj", module.down_proj, module.down_noise),
    ):
        recipe = module.recipes[part]
        stacks.append([form[0] for form in quantize_experts(weight, recipe, noise)] if recipe.quantized else weight)
    if all(isinstance(stack[0], NVFP4Tensor) for stack in stacks):
        return QuantizedExperts(*map(NVFP4Weight.from_tensors, stacks))
    ups, downs = (torch.stack([_plain(form, dtype) for form in stack]) for stack in stacks)
    made = Experts(ups.shape[0], ups.shape[2], ups.shape[1])
    made.up_proj, made.down_proj = nn.Parameter(ups, False), nn.Parameter(downs, False)
    return made


def _plain(form, dtype: torch.dtype) -> Tensor:
    return (form if isinstance(form, Tensor) else form.dequantize(dtype)).detach().to(dtype)
