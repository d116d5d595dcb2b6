"""a @ b.T of quantized or plain operands in plain torch: decode by block scale, multiply in fp32, global scales last."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.layout import pad_last
from nvfp4_kernels.formats.tensor import MXFP8Tensor, NVFP4Tensor
from nvfp4_kernels.ops.dequantize import reference as dequantize

Operand = NVFP4Tensor | MXFP8Tensor | Tensor


def refuses(
    a: Operand, b: Operand, bias: Tensor | None, out_dtype: torch.dtype, out: Tensor | None, accumulate: bool
) -> str | None:
    return None


def run(
    a: Operand, b: Operand, bias: Tensor | None, out_dtype: torch.dtype, out: Tensor | None, accumulate: bool
) -> Tensor:
    """y [M, N] = (g_a g_b) * sum_k decode(a)[m, k] decode(b)[n, k] + bias, fp32 until one rounding at the end."""
    (left, g_left), (right, g_right) = _decoded(a), _decoded(b)
    k = max(left.shape[-1], right.shape[-1])  # a plain operand brings no padding
    y = (pad_last(left, k) @ pad_last(right, k).t()) * (g_left * g_right)
    if bias is not None:
        y = y + bias.to(torch.float32)
    if out is None:
        return y.to(out_dtype)
    return out.add_(y) if accumulate else out.copy_(y)


def _decoded(x: Operand) -> tuple[Tensor, Tensor | float]:
    """fp32 values under the block scales alone (exact), and the global scale that stays outside the sum."""
    match x:
        case NVFP4Tensor():
            one = torch.ones_like(x.global_scale)
            return dequantize.run(x.codes, x.scales, one, 2 * x.codes.shape[-1], torch.float32), x.global_scale
        case MXFP8Tensor():
            return dequantize.run(x.codes, x.scales, None, x.codes.shape[-1], torch.float32), 1.0
    return x.to(torch.float32), 1.0
