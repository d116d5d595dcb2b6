"""The model as it is served: weights in the form that decoding reads, made once and not at each token."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvfp4_kernels.autograd.experts import quantize_experts
from nvfp4_kernels.autograd.linear import quantize_weight
from nvfp4_kernels.autograd.plain import dense
from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.formats.packed import PackedNVFP4Tensor
from nvfp4_kernels.formats.tensor import MXFP8Tensor, NVFP4Tensor
from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.nn.moe import Experts
from nvfp4_kernels.nn.quantized import NVFP4Weight, QuantizedExperts
from nvfp4_kernels.ops._dispatch import implementation, select
from nvfp4_kernels.ops.hadamard.op import hadamard
from nvfp4_kernels.ops.matmul._packed import packed
from nvfp4_kernels.ops.matmul.op import matmul

# Up to so many rows the CPU kernels sum in one and the same order (csrc/matmul/few_rows.h, few_rows_plain.h). More rows of a
# decoded batch are multiplied in parts, up to _PARTS of them: what a row says then does not depend on how many there are.
_FEW = {"plain": 12, "nvfp4": 32}
_PARTS = 4


class ServedLinear(nn.Module):
    """x W^T + b: nk.matmul without its checks and torch's dispatcher, which a decoded token would feel at each layer.

    weight: [out, in], of x's dtype, an NVFP4Tensor or a PackedNVFP4Tensor. Neither it nor the bias is a buffer: a served model
    stays where it is. A packed weight goes to nk.matmul, which unpacks it for what its kernels do not take.
    """

    def __init__(self, weight: Tensor | NVFP4Tensor | PackedNVFP4Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = weight, None if bias is None else bias.detach()
        self.plain = isinstance(weight, Tensor)
        self.few = _FEW["plain" if self.plain else "nvfp4"]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        count = rows.shape[0]
        if self.plain and (count > _PARTS * self.few or x.dtype == torch.float64):
            return dense(x, self.weight, self.bias)
        if not self.plain and (isinstance(self.weight, PackedNVFP4Tensor) or not x.is_cpu):
            return matmul(x, self.weight, x.dtype, bias=self.bias)
        rest = self.weight, self.bias, x.dtype, None, False
        kernel = select("matmul", rows, *rest)
        if kernel is not implementation("matmul", "native"):  # the order of sums is the CPU kernels' own
            return (
                F.linear(x, self.weight, self.bias) if self.plain else kernel.run(rows, *rest).view(*x.shape[:-1], -1)
            )
        in_parts = self.few < count <= _PARTS * self.few
        y = torch.cat([kernel.run(p, *rest) for p in rows.split(self.few)]) if in_parts else kernel.run(rows, *rest)
        return y.view(*x.shape[:-1], y.shape[1])


def serving(model: nn.Module) -> nn.Module:
    """A copy of a HybridModel in evaluation mode, to decode with; it shares whatever needs no other form.

    Linear layers and experts: where the recipe quantizes nothing, weights of the activations' dtype; where it does, the
    quantized weights that training multiplies with, NVFP4 kept in four bits, MXFP8, and experts whose rows are no whole
    blocks, decoded to the activations' dtype;
    matrices of NVFP4 packed where the CUDA kernels read them in place, those of the model itself too, which hold their
    weights as the copy does and not a second time (NVFP4Weight.pack; what the model says and saves is the same);
    activations stay in theirs (quantizing them, as training does, takes a scale from the whole batch: what a sequence says
    would depend on its neighbours). Norms, convolutions, A, D and dt_bias stay as they are. Weights that are
    quantized already (nn.quantized) are shared.
    """
    dtype = model.config.dtype
    for module in model.modules():
        if isinstance(module, QuantizedExperts) or isinstance(module, NVFP4Weight) and module.experts is None:
            module.pack(dtype)
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}  # shared by the copy
    table = model.backbone.embeddings.weight
    memo[id(table)] = nn.Parameter(table.detach().to(dtype), False)
    made = copy.deepcopy(model, memo).eval()
    for name, module in list(made.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, Linear):
            setattr(made.get_submodule(parent), child, _linear(module, dtype))
        elif isinstance(module, NVFP4Weight) and module.experts is None:
            setattr(made.get_submodule(parent), child, ServedLinear(module.tensor(), module.bias))
        elif isinstance(module, Experts):
            setattr(made.get_submodule(parent), child, _experts(module, dtype))
    return made


@torch.no_grad()
def _linear(module: Linear, dtype: torch.dtype) -> nn.Module:
    bias = None if module.bias is None else module.bias.to(dtype)
    form = quantize_weight(module.weight, module.recipe, module.noise)[0] if module.recipe.quantized else module.weight
    if _kept(form):
        return ServedLinear(packed(form, dtype) or form, bias)
    return ServedLinear(_plain(form, dtype)[:, : module.in_features], bias)


@torch.no_grad()
def _experts(module: Experts, dtype: torch.dtype) -> nn.Module:
    stacks = []
    for part, weight, noise in (
        ("up_proj", module.up_proj, module.up_noise),
        ("down_proj", module.down_proj, module.down_noise),
    ):
        recipe = module.recipes[part]
        stacks.append(
            _matrices(quantize_experts(weight, recipe, noise)[0], weight.shape) if recipe.quantized else weight
        )
    whole = all(weight.shape[2] % NVFP4Weight.BLOCK == 0 for weight in (module.up_proj, module.down_proj))
    if whole and all(_kept(stack[0]) for stack in stacks):
        made = QuantizedExperts(*map(NVFP4Weight.from_tensors, stacks))
        made.pack(dtype)
        return made
    ups, downs = (
        _plain(stack, dtype)
        if isinstance(stack, Tensor)
        else torch.stack([_plain(form, dtype)[:, : weight.shape[2]] for form in stack])
        for stack, weight in zip(stacks, (module.up_proj, module.down_proj), strict=True)
    )
    with torch.device("meta"):
        made = Experts(ups.shape[0], ups.shape[2], ups.shape[1])
    made.up_proj, made.down_proj = nn.Parameter(ups, False), nn.Parameter(downs, False)
    made.up_noise, made.down_noise = module.up_noise, module.down_noise
    return made


def _matrices(stack: Stack, shape: torch.Size) -> list[NVFP4Tensor | MXFP8Tensor | Tensor]:
    """Each matrix by itself of the stack of forms of a weight [experts, out, in]."""
    _, rows, cols = shape
    if stack.scales is None:
        return list(stack.values)
    if stack.global_scales is None:
        return [MXFP8Tensor(*parts, (rows, cols)) for parts in zip(*stack[:2], strict=True)]
    cols = cols if stack.hadamard is None else 2 * stack.values.shape[2]
    return [NVFP4Tensor(*parts, (rows, cols), stack.hadamard) for parts in zip(*stack[:3], strict=True)]


def _kept(form) -> bool:
    """Whether a form stays in four bits. A rotated one does not: activations in their own precision are not rotated."""
    return isinstance(form, NVFP4Tensor) and form.hadamard is None


def _plain(form, dtype: torch.dtype) -> Tensor:
    signs = getattr(form, "hadamard", None)
    if signs is None:
        return (form if isinstance(form, Tensor) else form.dequantize(dtype)).detach().to(dtype)
    turned = form.dequantize(torch.float32).unflatten(-1, (-1, 16))
    rotation = hadamard(torch.eye(16, device=turned.device), signs).float()  # orthogonal, of quarters: exact
    return (turned @ rotation.t()).flatten(-2).to(dtype)
