"""Linear layers over frozen quantized weights: the input gets a gradient, the weight none."""

import torch
from torch import Tensor

from nvfp4_kernels.autograd.experts import tokens_of
from nvfp4_kernels.autograd.linear import autocast
from nvfp4_kernels.autograd.plain import product
from nvfp4_kernels.formats.groups import Stack, transposed
from nvfp4_kernels.formats.packed import PackedNVFP4Tensor
from nvfp4_kernels.formats.tensor import MXFP8Tensor, NVFP4Tensor
from nvfp4_kernels.ops._check import float_tensor, require
from nvfp4_kernels.ops.grouped_matmul.op import grouped_matmul, unpacked
from nvfp4_kernels.ops.matmul.op import matmul
from nvfp4_kernels.ops.permute.op import sum_slots
from nvfp4_kernels.ops.route.op import Routing

DECODED = 32 << 20  # bytes of a weight decoded at a time, which the caches of GPUs hold


def weight_only(
    x: Tensor,
    weight: NVFP4Tensor | MXFP8Tensor | PackedNVFP4Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """y = (x W^T) scale + b: products of x with the exactly decoded weight, summed in fp32.

    x: [..., in], bf16, fp16 or fp32; under torch.autocast it is cast to autocast's dtype first. weight: [out, in], an
    NVFP4Tensor, MXFP8Tensor or PackedNVFP4Tensor. bias: [out] or None. scale: fp32 [], one more factor of the weight, or None.
    Rounded once to x's dtype (with a scale: to fp32 before it).
    Differentiable in x and bias. Raises TypeError or ValueError naming the argument, as nk.matmul.
    """
    float_tensor("x", x)
    require(x.dim() >= 1 and x.shape[-1] > 0, "x", f"shape {list(x.shape)}", "[..., in], in at least 1")
    known = isinstance(weight, (NVFP4Tensor, MXFP8Tensor, PackedNVFP4Tensor))
    require(known, "weight", type(weight).__name__, "NVFP4Tensor, MXFP8Tensor, PackedNVFP4Tensor", TypeError)
    x = autocast(x)
    given = lambda: weight  # noqa: E731  torch 2.10 makes a dataclass anew around symbols, which its checks cannot read
    return _WeightOnly.apply(x.reshape(-1, x.shape[-1]), given, bias, scale).view(*x.shape[:-1], weight.shape[0])


def weight_only_experts(x: Tensor, weight: Stack, groups: Routing | Tensor) -> Tensor:
    """y[row] = W[e] x[row] for the expert e of each row, sorted by expert: e has the rows groups[e] to [e + 1] of x [rows, in].
    Or x is the tokens [tokens, in] of a Routing, gathered as they are read.

    Differentiable in x. Raises TypeError or ValueError naming the argument, as nk.grouped_matmul.
    """
    x = autocast(x)
    if isinstance(groups, Tensor):
        return _WeightOnlyExperts.apply(x, weight, groups, None, None)
    tokens = groups.inverse.shape[0]
    require(x.dim() == 2 and len(x) == tokens, "x", f"shape {list(x.shape)}", f"[{tokens}, in], as routed")
    return _WeightOnlyExperts.apply(x, weight, groups.offsets, groups.order, groups.inverse)


class _WeightOnlyExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, offsets, order, inverse):
        ctx.weight, ctx.cols, ctx.routing = weight, x.shape[1], (offsets, order, inverse)
        return grouped_matmul(x, weight, offsets, rows=tokens_of(order, inverse))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        offsets, order, inverse = ctx.routing
        dx = grouped_matmul(dy, transposed(unpacked(ctx.weight, ctx.cols)), offsets)
        return dx if order is None else sum_slots(dx, order, inverse), None, None, None, None


class _WeightOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, given, bias, scale):
        ctx.weight, ctx.scale, ctx.bias_dtype = given(), scale, None if bias is None else bias.dtype
        if scale is None:
            return matmul(x, ctx.weight, x.dtype, bias=bias)
        y = matmul(x, ctx.weight, torch.float32) * scale
        return (y if bias is None else y + bias).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _times(dy, ctx.weight)
            dx = dx if ctx.scale is None else dx * ctx.scale.to(dx.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy.float().sum(0).to(ctx.bias_dtype)
        return dx, None, dbias, None


def _times(dy: Tensor, weight: NVFP4Tensor | MXFP8Tensor) -> Tensor:
    """dy [rows, out] @ weight, so many of its columns at a time."""
    (out, cols), rows = weight.shape, dy.shape[0]
    dx, most = dy.new_empty(rows, cols), max(128, DECODED // (out * dy.element_size()) // 128 * 128)
    for first in range(0, cols, most):
        last = min(first + most, cols)
        part = weight.columns(first, last).dequantize(dy.dtype)
        made = product(dy, part.t())
        if made is None:
            torch.mm(dy, part, out=dx[:, first:last])
        else:
            dx[:, first:last] = made
    return dx
