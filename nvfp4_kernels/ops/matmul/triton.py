"""a @ b.T in Triton: on FP4 tensor cores where both operands are NVFP4 and the device has them (_triton_block_scaled.py), of
decoded operands everywhere else (_triton_decoded.py).

Decoding in the product's own kernel repeats it for each tile of the other operand. Above 256 rows on either side it is
cheaper to decode once, to memory: 2.56 bytes a value, against a product that reads it back from the cache.
"""

import torch
from torch import Tensor

from nvfp4_kernels.formats.tensor import MXFP8Tensor, NVFP4Tensor
from nvfp4_kernels.ops import _device
from nvfp4_kernels.ops._triton import refuses_device
from nvfp4_kernels.ops.dequantize import triton as dequantize
from nvfp4_kernels.ops.matmul import _triton_block_scaled, _triton_decoded
from nvfp4_kernels.ops.matmul._triton_tiles import Side, plain_side, side

Operand = NVFP4Tensor | MXFP8Tensor | Tensor


def refuses(
    a: Operand, b: Operand, bias: Tensor | None, out_dtype: torch.dtype, out: Tensor | None, accumulate: bool
) -> str | None:
    return refuses_device(a.codes if isinstance(a, (NVFP4Tensor, MXFP8Tensor)) else a)


def run(
    a: Operand, b: Operand, bias: Tensor | None, out_dtype: torch.dtype, out: Tensor | None, accumulate: bool
) -> Tensor:
    """y [M, N] = (g_a g_b) * sum_k decode(a)[m, k] decode(b)[n, k] + bias, fp32 until one rounding at the end."""
    left, right = side(a), side(b)
    if out is None:
        out = torch.empty(left.rows, right.rows, dtype=out_dtype, device=left.codes.device)
    cores = _device.fp4_tensor_cores(out.device)
    if cores and left.format == right.format == "nvfp4":
        _triton_block_scaled.multiply(left, right, bias, out, accumulate, cores)
        return out
    if left.rows > 256 and right.rows > 256:
        dtype = torch.float16 if "float16" in (left.format, right.format) else torch.bfloat16
        left, right = _once_decoded(left, dtype), _once_decoded(right, dtype)
    _triton_decoded.multiply(left, right, bias, out, accumulate)
    return out


def _once_decoded(x: Side, dtype: torch.dtype) -> Side:
    """The operand as a plain one under the block scales; MXFP8, which has bf16's range, always as bf16."""
    if x.format not in ("nvfp4", "mxfp8"):
        return x
    values = torch.empty(
        x.rows, x.length, dtype=dtype if x.format == "nvfp4" else torch.bfloat16, device=x.codes.device
    )
    dequantize.decode(x.codes, x.scales, None, x.format, values)
    return plain_side(values, x.global_scale)
