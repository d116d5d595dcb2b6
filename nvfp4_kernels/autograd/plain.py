"""y = x W^T by nk.matmul where torch's own product is slower.

In fp32 on AMD's processors with AVX-512, of whose width MKL uses half: measured at 2048 x 256 x 256 on one core of an AMD EPYC,
52 products a nanosecond against 100, forward and both gradients alike.

In bf16 and fp16 on processors with AVX2 alone, for which torch has loops without instructions for 16 bits: measured on one core
of a first EPYC, in bf16, at 2048 x 256 x 256 7.6 times as fast forward and 9.1 times with both gradients, at 2048 x 1024 x 1024
6.5 and 20 times; in fp16 at 2048 x 256 x 256 6.5 and 16 times.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nvfp4_kernels.ops._dispatch import candidates, implementation
from nvfp4_kernels.ops._library import ordinary, unwrapped
from nvfp4_kernels.ops.matmul.op import matmul

# The least products by dtype, some tens of microseconds of torch's; with fewer the call costs more than it saves.
LEAST = {torch.float32: 1 << 22, torch.bfloat16: 1 << 18, torch.float16: 1 << 18}


class _Product(torch.autograd.Function):
    """a @ b.T + bias, differentiable any number of times."""

    @staticmethod
    def forward(ctx, a, b, bias):
        ctx.save_for_backward(a, b)
        return matmul(a, b, bias=bias)

    @staticmethod
    def backward(ctx, dy):
        a, b = ctx.saved_tensors
        wants_da, wants_db, wants_dbias = ctx.needs_input_grad
        dy = dy.contiguous()
        da = _Product.apply(dy, b.t(), None) if wants_da else None
        db = _Product.apply(dy.t(), a.t(), None) if wants_db else None
        return da, db, dy.sum(0) if wants_dbias else None


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch.nn.functional.linear, by `product` where it serves."""
    y = product(x, weight, bias)
    return F.linear(x, weight, bias) if y is None else y


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """x @ weight.T + bias, differentiable; None where torch is to make it, which it is where anybody would see the difference.

    x: [..., in]. weight: [out, in]. bias: [out] or None.
    """
    operands = (x, weight) if bias is None else (x, weight, bias)
    if not unwrapped(x) or not all(ordinary(t) and t.is_cpu and t.dtype == x.dtype for t in operands):
        return None
    if candidates("matmul")[0] != "native" or not implementation("matmul", "native").outruns_torch(x.dtype):
        return None
    fits = x.shape[-1:] == weight.shape[1:] and (bias is None or bias.shape == weight.shape[:1])
    if not fits or x.numel() * weight.shape[0] < LEAST[x.dtype]:
        return None
    if torch.autograd.forward_ad._current_level >= 0:
        return None
    return _Product.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])
