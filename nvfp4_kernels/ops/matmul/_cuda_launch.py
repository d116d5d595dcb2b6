"""Parameters of csrc/matmul's kernels for packed weights, as csrc/matmul/launch.h lays them out."""

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops import _cuda
from nvfp4_kernels.ops._cuda import address
from nvfp4_kernels.ops._native import DTYPES

_WEIGHT_ONLY = struct.Struct("QqqQQQQQQQqqqqqiiiiQQqq")
DECODE = struct.Struct("QQQqq")


class Groups(NamedTuple):
    """offsets: int64 [groups + 1], group e having the tokens offsets[e] to offsets[e + 1]. order: int64 [tokens], whose token t
    reads row order[t] // top_k of a; None: row t."""

    offsets: Tensor | None
    order: Tensor | None = None
    top_k: int = 1


ALL = Groups(None)


def lined_up(a: Tensor) -> Tensor:
    """a, or a copy, with contiguous rows that begin at multiples of 16 bytes and an even number of columns at least in memory
    that holds zeros beyond them."""
    cols = a.shape[1]
    if a.stride(1) == 1 and cols % 2 == 0 and _cuda.aligned(a):
        return a
    return torch.nn.functional.pad(a, (0, -cols % 8)).contiguous()


def weight_only(
    a: Tensor,
    w: Stack,
    bias: Tensor | None,
    out: Tensor,
    accumulate: bool,
    splits: int,
    partial: Tensor | None,
    counters: Tensor | int | None = None,
    groups: Groups = ALL,
    relu2: bool = False,
) -> bytes:
    """out [tokens, rows] = a @ w.T + bias, `a` lined up, w packed: a matrix, or with groups a stack. Pointers to tensors
    that must stay alive until the launch."""
    (tokens, rows), length = out.shape, w.values.shape[-3] * 64
    count = 1 if groups.offsets is None else len(groups.offsets) - 1
    return _WEIGHT_ONLY.pack(
        *(a.data_ptr(), len(a), a.stride(0), w.values.data_ptr(), w.scales.data_ptr(), w.global_scales.data_ptr()),
        *(address(bias), out.data_ptr(), address(partial), address(counters)),
        *(tokens, rows, a.shape[1], length, splits),
        *(0 if bias is None else DTYPES[bias.dtype], DTYPES[out.dtype], accumulate, relu2),
        *(address(groups.offsets), address(groups.order), count, groups.top_k),
    )
