"""NVFP4 times NVFP4 on sm_120 and sm_121 through csrc/matmul/sm120.cuh: how k is split, with which parameters."""

import struct

import torch
from torch import Tensor

from nvfp4_kernels.formats.layout import pad_last
from nvfp4_kernels.formats.tensor import NVFP4Tensor
from nvfp4_kernels.ops import _cuda
from nvfp4_kernels.ops._cuda import address
from nvfp4_kernels.ops._native import DTYPES
from nvfp4_kernels.ops.matmul._cuda import zeros

# csrc/matmul/sm120.cuh: a tile's rows and columns; k of a stage of codes, and of one of scales.
SIDE, THREADS, STEP, PIECE = 128, 128, 128, 256
SHARED = 2 * (2 * SIDE * STEP // 2 + 2 * SIDE * PIECE // 16)
# Two for each of an RTX 5090's 170 processors; one number for all devices, so that all give the same bits.
BLOCKS = 340
LEAST_PIECES = 2  # of a split: the sums of fewer take longer on their way than the products

LAUNCH = struct.Struct("10Q4q4i")


def refuses(a, b, bias: Tensor | None, out_dtype: torch.dtype, out: Tensor | None, accumulate: bool) -> str | None:
    return _cuda.refuses_device("matmul", a.codes)


def splits(rows: int, cols: int, length: int) -> int:
    """Parts of k: as many as fill the device."""
    tiles = -(-rows // SIDE) * -(-cols // SIDE)
    return max(1, min(BLOCKS // tiles, length // PIECE // LEAST_PIECES))


def run(a: NVFP4Tensor, b: NVFP4Tensor, bias: Tensor | None, out: Tensor, accumulate: bool) -> Tensor:
    """out [rows, cols] = a @ b.T + bias, added to what is there with `accumulate`."""
    if not out.numel():
        return out
    (rows, cols), left, right = out.shape, _lined_up(a), _lined_up(b)
    length, bias = 2 * left[0].shape[1], None if bias is None else bias.contiguous()
    parts, tiles = splits(rows, cols, length), -(-rows // SIDE) * -(-cols // SIDE)
    partial = counters = None
    if parts > 1:
        partial = torch.empty(tiles * parts * SIDE * SIDE, dtype=torch.float32, device=out.device)
        counters = zeros(tiles, out.device)
    parameters = LAUNCH.pack(
        *(part.data_ptr() for part in (*left, *right)),
        *(address(bias), out.data_ptr(), address(partial), address(counters)),
        *(rows, cols, length, parts),
        *(0 if bias is None else DTYPES[bias.dtype], DTYPES[out.dtype], accumulate),
        cols % 4 == 0 and out.data_ptr() % 16 == 0,
    )
    _cuda.launch("matmul", "block_scaled", (tiles, parts), THREADS, SHARED, parameters, out)
    return out


def _lined_up(x: NVFP4Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, global scale. A row's scales are a multiple of 4 bytes, zeros beyond them as in the codes, and both
    begin at multiples of 16 bytes: copies, where x is otherwise."""
    codes, scales = pad_last(x.codes, 32), pad_last(x.scales.view(torch.uint8), 4)
    codes, scales = (part.contiguous() for part in (codes, scales))
    codes, scales = (part.clone() if part.data_ptr() % 16 else part for part in (codes, scales))
    return codes, scales, x.global_scale
