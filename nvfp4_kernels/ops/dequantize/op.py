"""dequantize: a quantized tensor back to high precision."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.tensor import MXFP8Tensor, NVFP4Tensor
from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._library import register


def dequantize(q: NVFP4Tensor | MXFP8Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of `q`, [*q.shape]: code * (scale * global_scale) in fp32, then one rounding to `dtype`.

    q: NVFP4Tensor or MXFP8Tensor. dtype: bfloat16, float16 or float32.
    A form that went through the Hadamard transform is decoded as it is, in the rotated space.
    Raises TypeError naming the argument.
    """
    require(isinstance(q, (NVFP4Tensor, MXFP8Tensor)), "q", type(q).__name__, "NVFP4Tensor, MXFP8Tensor", TypeError)
    return q.dequantize(dtype)


def _run(codes: Tensor, scales: Tensor, global_scale: Tensor | None, cols: int, dtype: str) -> Tensor:
    # fp8 crosses the boundary as bytes, for which torch's tools have kernels
    if global_scale is None:
        codes = codes.view(torch.float8_e4m3fn)
    else:
        scales = scales.view(torch.float8_e4m3fn)
    arguments = (codes, scales, global_scale, cols, getattr(torch, dtype))
    return select("dequantize", *arguments).run(*arguments)


def _fake(codes: Tensor, scales: Tensor, global_scale: Tensor | None, cols: int, dtype: str) -> Tensor:
    return codes.new_empty(codes.shape[0], cols, dtype=getattr(torch, dtype))


register("dequantize(Tensor codes, Tensor scales, Tensor? global_scale, SymInt cols, str dtype) -> Tensor", _run, _fake)
