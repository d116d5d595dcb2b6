"""All groups in one call of csrc/grouped_matmul, whose threads share the groups' columns by what they cost."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ops._native import DTYPES, check, native, refuses_float

NVFP4 = 3  # the kind of operand beyond the dtypes


def refuses(a: Tensor, b: Stack, offsets: Tensor, out_dtype: torch.dtype) -> str | None:
    return refuses_float(a) or ("float64" if torch.float64 in (b.values.dtype, out_dtype) else None)


def run(a: Tensor, b: Stack, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    b = readable(b)
    right, stride = operand(b)
    sums = b.values.dim() == 2
    groups = offsets.numel() - 1
    shape = (groups, len(a), len(b.values)) if sums else (len(a), b.values.shape[1])
    y = torch.empty(shape, dtype=out_dtype)
    left = (DTYPES[a.dtype], a.data_ptr(), 0, 0, *a.shape, *a.stride())
    threads = torch.get_num_threads()
    status = native.grouped_matmul(
        left, right, stride, offsets.data_ptr(), groups, sums, y.data_ptr(), DTYPES[out_dtype], threads
    )
    require(
        status != 2, "offsets", offsets.tolist(), f"ascending numbers from 0 to {a.shape[sums]}, the number of rows"
    )
    check(status)
    return y


def readable(b: Stack) -> Stack:
    """The same with codes and scales in order, as the kernels read them; plain values may have any strides."""
    return b if b.scales is None else Stack(*(part.contiguous() for part in b[:3]))


def operand(b: Stack) -> tuple[tuple, int]:
    """The first matrix as csrc/bindings.cpp calls an operand, and the elements from it to the next plain one."""
    values, scales, global_scales = b[:3]
    if scales is None:
        stride = values.stride(0) if values.dim() == 3 else 0
        return (DTYPES[values.dtype], values.data_ptr(), 0, 0, *values.shape[-2:], *values.stride()[-2:]), stride
    places = (part.data_ptr() for part in (values, scales, global_scales))
    return (NVFP4, *places, values.shape[1], 2 * values.shape[2], 0, 0), 0
