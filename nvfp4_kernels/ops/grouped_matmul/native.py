"""All groups in one call of csrc/grouped_matmul, whose threads share the groups' columns by what they cost; on GPUs bf16
times a packed stack."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Columns, Stack, is_packed, rows_of
from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ops._native import DTYPES, FP8, MXFP8, NVFP4, check, empty, native, refuses_device, refuses_float
from nvfp4_kernels.ops.grouped_matmul import _cuda


def refuses(
    a: Stack | Columns, b: Stack | Columns, offsets: Tensor, out_dtype: torch.dtype, rows: Tensor | None = None
) -> str | None:
    if isinstance(b, Stack) and is_packed(b):
        return _cuda.refuses(a, b, offsets, out_dtype, rows)
    why = refuses_float(a.values) if a.scales is None else refuses_device(a.values)
    return why or ("float64" if torch.float64 in (b.values.dtype, out_dtype) else None)


def run(
    a: Stack | Columns,
    b: Stack | Columns,
    offsets: Tensor,
    out_dtype: torch.dtype,
    rows: Tensor | None = None,
    squares: tuple[Tensor | int | None, ...] = (None,) * 6,
) -> Tensor:
    """squares: h, relu2(h), weights, dweights, amax [3, groups] and the signs of its transform, for nk.grouped_relu2."""
    if isinstance(b, Stack) and is_packed(b):
        return _cuda.run(a, b, offsets, out_dtype, rows)
    a, b = readable(a), readable(b)
    sums = b.values.dim() == 2
    if sums and rows is not None and (b.values.stride(0) != 1 or b.values.stride(1) == 1):
        b, rows = Stack(b.values.t().index_select(0, rows).t()), None  # the kernel gathers columns that lie apart
    left, (right, stride) = operand(a)[0], operand(b)
    groups, count = offsets.numel() - 1, len(a.values) if rows is None else len(rows)
    shape = (groups, len(a.values), len(b.values)) if sums else (count, rows_of(b))
    y = empty(shape, dtype=out_dtype)
    starts = tuple(x.starts.data_ptr() if isinstance(x, Columns) else 0 for x in (a, b))
    threads = torch.get_num_threads()
    status = native.grouped_matmul(
        left, right, stride, starts, () if rows is None else (count, rows.data_ptr()),
        offsets.data_ptr(), groups, sums, y.data_ptr(), DTYPES[out_dtype],
        _squares(*squares), threads,
    )  # fmt: skip
    last = "the number of rows" if starts[0] else f"{a.values.shape[1] if sums else count}, the number of rows"
    require(status != 2, "offsets", offsets.tolist(), f"ascending numbers from 0 to {last}")
    require(
        status != 3, "a and b", "starts without room for the groups' rows", "Columns as nk.quantize_groups makes them"
    )
    check(status)
    return y


def _squares(*given: Tensor | int | None) -> tuple[int, ...]:
    """What csrc/bindings.cpp calls squares."""
    *places, signs = given
    amax = places[-1]
    turned = None if amax is None or signs is None else amax[2]
    return *(0 if x is None else x.data_ptr() for x in (*places, turned)), signs or 0


def readable(x: Stack | Columns) -> Stack | Columns:
    """The same with codes and scales in order, as the kernels read them; plain values may have any strides."""
    names = ("global_scales",) if x.scales is None else ("values", "scales", "global_scales")
    parts = {n: part for n in names if (part := getattr(x, n)) is not None and not part.is_contiguous()}
    return x._replace(**{n: part.contiguous() for n, part in parts.items()}) if parts else x


def operand(x: Stack | Columns) -> tuple[tuple, int]:
    """The first matrix as csrc/bindings.cpp calls an operand, and the values from it to the next."""
    values, scales, global_scales = x[:3]
    places = [0 if part is None else part.data_ptr() for part in (values, scales, global_scales)]
    if scales is None:
        kind, stride = DTYPES.get(values.dtype, FP8), values.stride(0) if values.dim() == 3 else 0
        return (kind, *places, *values.shape[-2:], *values.stride()[-2:]), stride
    rows, cols = values.shape[-2], values.shape[-1] * (1 if global_scales is None else 2)
    shape = (cols, rows, 1, cols) if getattr(x, "turned", False) else (rows, cols, cols, 1)
    return (MXFP8 if global_scales is None else NVFP4, *places, *shape), rows * cols
