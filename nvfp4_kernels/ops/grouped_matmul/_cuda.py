"""Rows of bf16, sorted by group, times a packed stack: one launch of csrc/matmul/cuda.cu for all groups, of whatever sizes. Or,
of large groups where the chip has no kernel for them, some matrices at a time decoded to memory, exactly, and multiplied in
Triton. Nothing is read by the host.
"""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Columns, Stack, rows_of
from nvfp4_kernels.ops import _cuda, _device
from nvfp4_kernels.ops.grouped_matmul import triton
from nvfp4_kernels.ops.matmul import _cuda as matmul
from nvfp4_kernels.ops.matmul import _cuda_slabs, _cuda_sm90
from nvfp4_kernels.ops.matmul._cuda_launch import Groups

# Rows of a group, on average, from which decoding, 4.6 bytes a weight, costs less than mma.sync of 64 rows at a time loses to
# a product of large tiles: a third of the rate where tcgen05 is the chip's own instruction, four fifths elsewhere.
LARGE = {"tcgen05": 256, None: 1024}
DECODED = 256 << 20  # bytes of matrices decoded at a time, a few hundred tiles of the product


def refuses(a: Stack | Columns, b: Stack, offsets: Tensor, out_dtype: torch.dtype, rows: Tensor | None) -> str | None:
    if a.values.dtype != torch.bfloat16:
        return "packed weights are multiplied by rows of bfloat16"
    return _cuda.refuses_device("matmul", a.values)


def run(a: Stack, b: Stack, offsets: Tensor, out_dtype: torch.dtype, rows: Tensor | None) -> Tensor:
    count = len(a.values if rows is None else rows)
    out = torch.empty(count, rows_of(b), dtype=out_dtype, device=a.values.device)
    return run_groups(a.values, b, Groups(offsets, rows), out)


def run_groups(a: Tensor, w: Stack, groups: Groups, out: Tensor, relu2: bool = False) -> Tensor:
    """As matmul's, by whichever way suits the groups' mean size."""
    if _is_large(a, out, len(w.values)) and triton.refuses(Stack(a), w, groups.offsets, out.dtype) is None:
        return _run_decoded(a, w, groups, out, relu2)
    return matmul.run_groups(a, w, groups, out, relu2)


def _is_large(a: Tensor, out: Tensor, count: int) -> bool:
    least = LARGE.get(_device.fp4_tensor_cores(a.device), LARGE[None])
    return len(out) >= least * count > 0 and _cuda.refuses_arch(_cuda_sm90.ARCH, a) is not None


def _run_decoded(a: Tensor, w: Stack, groups: Groups, out: Tensor, relu2: bool) -> Tensor:
    index = None if groups.order is None else torch.div(groups.order, groups.top_k, rounding_mode="floor")
    length = w.values.shape[2] * 64
    most = min(len(w.values), max(1, DECODED // (2 * rows_of(w) * length)))
    decoded = torch.empty(most, rows_of(w), length, dtype=torch.bfloat16, device=a.device)
    for first in range(0, len(w.values), most):
        some = Stack(*(part[first : first + most] for part in w[:3]))
        values = decoded[: len(some.values)]
        _cuda_slabs.decode(some.values.flatten(0, 1), some.scales.flatten(0, 1), values.flatten(0, 1))
        plain = Stack(values, None, some.global_scales)
        triton.write_rows(Stack(a), plain, groups.offsets[first : first + most + 1], out, index, relu2)
    return out
