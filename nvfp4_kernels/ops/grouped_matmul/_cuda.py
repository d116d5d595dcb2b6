"""Rows of bf16, sorted by group, times a packed stack: one launch of csrc/matmul/cuda.cu for all groups, of whatever sizes."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Columns, Stack
from nvfp4_kernels.ops import _cuda
from nvfp4_kernels.ops.matmul import _cuda as matmul
from nvfp4_kernels.ops.matmul._cuda_launch import Groups


def refuses(a: Stack | Columns, b: Stack, offsets: Tensor, out_dtype: torch.dtype, rows: Tensor | None) -> str | None:
    if a.values.dtype != torch.bfloat16:
        return "packed weights are multiplied by rows of bfloat16"
    return _cuda.refuses_device("matmul", a.values)


def run(a: Stack, b: Stack, offsets: Tensor, out_dtype: torch.dtype, rows: Tensor | None) -> Tensor:
    count = len(a.values if rows is None else rows)
    out = torch.empty(count, b.rows, dtype=out_dtype, device=a.values.device)
    return matmul.run_groups(a.values, b, Groups(offsets, rows), out)
