"""Parameters of csrc/matmul's kernels for packed weights, as csrc/matmul/launch.h lays them out."""

import struct

import torch
from torch import Tensor

from nvfp4_kernels.formats.packed import PackedNVFP4Tensor
from nvfp4_kernels.ops import _cuda
from nvfp4_kernels.ops._cuda import address
from nvfp4_kernels.ops._native import DTYPES

_WEIGHT_ONLY = struct.Struct("QqQQQQQQQqqqqqiiq")
DECODE = struct.Struct("QQQqq")


def lined_up(a: Tensor) -> Tensor:
    """a, or a copy, with contiguous rows that begin at multiples of 16 bytes and an even number of columns at least in memory
    that holds zeros beyond them."""
    cols = a.shape[1]
    if a.stride(1) == 1 and cols % 2 == 0 and _cuda.aligned(a):
        return a
    return torch.nn.functional.pad(a, (0, -cols % 8)).contiguous()


def weight_only(
    a: Tensor,
    w: PackedNVFP4Tensor,
    bias: Tensor | None,
    out: Tensor,
    accumulate: bool,
    splits: int,
    partial: Tensor | None,
    counters: Tensor | None = None,
) -> bytes:
    """out [tokens, rows] = a @ w.T + bias, `a` lined up; pointers to tensors that must stay alive until the launch."""
    rows, length = w.codes.shape[0] * 16, w.codes.shape[1] * 64
    return _WEIGHT_ONLY.pack(
        *(a.data_ptr(), a.stride(0), w.codes.data_ptr(), w.scales.data_ptr(), w.global_scale.data_ptr()),
        *(address(bias), out.data_ptr(), address(partial), address(counters)),
        *(a.shape[0], rows, a.shape[1], length, splits),
        *(0 if bias is None else DTYPES[bias.dtype], DTYPES[out.dtype], accumulate),
    )
