"""The random Hadamard transform through csrc/hadamard."""

import torch
from torch import Tensor

from nvfp4_kernels.ops._native import DTYPES, check, empty, native, refuses_device


def refuses(x: Tensor, signs: int) -> str | None:
    return refuses_device(x)


def run(x: Tensor, signs: int) -> Tensor:
    """x [rows, cols] to bf16 [rows, ceil16(cols)]; signs: 16-bit mask, bit i set = sign i negative."""
    rows, cols = x.shape
    out = empty(rows, (cols + 15) // 16 * 16, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    check(native.hadamard(x.data_ptr(), DTYPES[x.dtype], rows, cols, *x.stride(), signs, out.data_ptr(), threads))
    return out
