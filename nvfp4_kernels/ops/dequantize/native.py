"""dequantize through csrc/dequantize."""

import torch
from torch import Tensor

from nvfp4_kernels.ops._native import DTYPES, check, empty, native, refuses_device


def refuses(codes: Tensor, scales: Tensor, global_scale: Tensor | None, cols: int, dtype: torch.dtype) -> str | None:
    return refuses_device(codes)


def run(codes: Tensor, scales: Tensor, global_scale: Tensor | None, cols: int, dtype: torch.dtype) -> Tensor:
    """[rows, cols] in `dtype`. NVFP4: packed codes, E4M3 scales, fp32 global scale. MXFP8: E4M3 codes, E8M0 scales, None."""
    codes, scales = codes.contiguous(), scales.contiguous()
    out = empty(codes.shape[0], cols, dtype=dtype)
    status = native.dequantize(
        codes.data_ptr(),
        scales.data_ptr(),
        0 if global_scale is None else global_scale.data_ptr(),
        out.data_ptr(),
        DTYPES[dtype],
        out.shape[0],
        cols,
        torch.get_num_threads(),
    )
    check(status)
    return out
