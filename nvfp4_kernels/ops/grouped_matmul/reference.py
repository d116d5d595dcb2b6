"""A product for each group in plain torch: the offsets come to the host, where the loop is.

Operands of the result's type go to torch as they are, whose products sum in fp32; others are widened first.
"""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops.dequantize import reference as dequantize


def refuses(a: Tensor, b: Stack, offsets: Tensor, out_dtype: torch.dtype) -> str | None:
    return None


def run(a: Tensor, b: Stack, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    if not a.dtype == b.values.dtype == out_dtype:
        a, b = _wide(a), b._replace(values=_wide(b.values)) if b.scales is None else b
    bounds = offsets.tolist()
    spans = [(e, slice(*bounds[e : e + 2])) for e in range(len(bounds) - 1) if bounds[e] < bounds[e + 1]]
    if b.values.dim() == 2:
        y = a.new_zeros(len(bounds) - 1, len(a), len(b.values), dtype=out_dtype)
        for e, rows in spans:
            y[e] = a[:, rows] @ b.values[:, rows].t()
        return y
    y = a.new_empty(len(a), b.values.shape[1], dtype=out_dtype)
    for e, rows in spans:
        values, factor = decoded(b, e, a.dtype)
        y[rows] = (a[rows] @ values.t()) * factor
    return y


def decoded(b: Stack, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """A matrix under its block scales, and the global scale, which stays outside the sums."""
    if b.scales is None:
        return b.values[group], 1.0
    one, cols = torch.ones_like(b.global_scales[group]), 2 * b.values.shape[2]
    scales = b.scales[group].view(torch.float8_e4m3fn)
    values = dequantize.run(b.values[group], scales, one, cols, torch.float32)
    return values.to(dtype), b.global_scales[group]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
