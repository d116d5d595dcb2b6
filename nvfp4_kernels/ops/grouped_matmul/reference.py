"""A product for each group in plain torch: the offsets come to the host, where the loop is.

Operands of the result's type go to torch as they are, whose products sum in fp32; others are widened first, quantized ones
decoded under their block scales alone.
"""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Columns, Stack, rows_of
from nvfp4_kernels.ops.dequantize import reference as dequantize
from nvfp4_kernels.ops.quantize._forms import check_ascending


def refuses(
    a: Stack | Columns, b: Stack | Columns, offsets: Tensor, out_dtype: torch.dtype, rows: Tensor | None = None
) -> str | None:
    return None


def run(
    a: Stack | Columns, b: Stack | Columns, offsets: Tensor, out_dtype: torch.dtype, rows: Tensor | None = None
) -> Tensor:
    """a, b: of two dimensions, but for a stack of matrices."""
    if rows is not None and b.values.dim() == 2:
        b = Stack(b.values[:, rows])
    elif rows is not None:
        a = a._replace(values=a.values[rows], scales=None if a.scales is None else a.scales[rows])
    types = {x.values.dtype if x.scales is None else None for x in (a, b)} | {out_dtype}
    dtype = out_dtype if len(types) == 1 or out_dtype == torch.float64 else torch.float32
    plain = [len(a.values)] if b.values.dim() > 2 else [x.values.shape[1] for x in (a, b) if x.scales is None]
    if plain:  # the rows of quantized columns are not told by their length
        check_ascending(offsets, plain[0])
    bounds = offsets.tolist()
    spans = [(e, slice(*bounds[e : e + 2])) for e in range(len(bounds) - 1) if bounds[e] < bounds[e + 1]]
    if b.values.dim() == 2:
        y = offsets.new_zeros(len(bounds) - 1, len(a.values), len(b.values), dtype=out_dtype)
        for e, span in spans:
            y[e] = _product(_columns(a, e, span, dtype), _columns(b, e, span, dtype))
        return y
    y = offsets.new_empty(len(a.values), rows_of(b), dtype=out_dtype)
    for e, span in spans:
        scales = None if a.scales is None else a.scales[span]
        rows = _decoded(a.values[span], scales, a.global_scales, dtype)
        y[span] = _product(rows, decoded(b, e, dtype))
    return y


def decoded(b: Stack, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """A matrix under its block scales, and the global scale, which stays outside the sums."""
    parts = (None if part is None else part[group] for part in b[:3])
    values, global_scale = _decoded(*parts, dtype)
    return values.t() if b.turned else values, global_scale


def _columns(x: Stack | Columns, group: int, span: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    if x.scales is None:
        return x.values[:, span].to(dtype), 1.0
    first, end = x.starts[group : group + 2].tolist()
    width, run = (2, 16) if x.global_scales is not None else (1, 32)
    values, scales = x.values[:, first // width : end // width], x.scales[:, first // run : end // run]
    return _decoded(values, scales, None if x.global_scales is None else x.global_scales[group], dtype)


def _decoded(
    values: Tensor, scales: Tensor | None, global_scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | float]:
    if scales is None:
        return values.to(dtype), 1.0 if global_scale is None else global_scale
    if global_scale is None:
        return dequantize.run(values, scales, None, values.shape[1], torch.float32).to(dtype), 1.0
    one, scales = torch.ones_like(global_scale), scales.view(torch.float8_e4m3fn)
    return dequantize.run(values, scales, one, 2 * values.shape[1], torch.float32).to(dtype), global_scale


def _product(a: tuple[Tensor, Tensor | float], b: tuple[Tensor, Tensor | float]) -> Tensor:
    """Beyond the shorter of two lengths the other has padding alone."""
    (left, g_left), (right, g_right) = a, b
    k = min(left.shape[1], right.shape[1])
    return (left[:, :k] @ right[:, :k].t()) * (g_left * g_right)
