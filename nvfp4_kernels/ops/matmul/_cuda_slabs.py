"""Many rows times a packed weight on any CUDA device: a slab of the weight decoded to bf16 under its block scales, exactly, by
csrc/matmul/cuda.cu, then torch's product of 16-bit matrices with fp32 results, slab after slab. Nothing is read by the host.

Decoding costs 0.56 + 2 bytes a weight and the product 2 more, which come from the L2 cache where a slab fits: H200's has 50 MB.
Against the product's own time that is 1.23 at 1,024 rows, 1.06 at 4,096, 1.03 at 8,192, all from memory.
"""

import torch
from torch import Tensor

from nvfp4_kernels.formats.packed import SLAB, PackedNVFP4Tensor
from nvfp4_kernels.ops import _cuda
from nvfp4_kernels.ops.matmul import _cuda_launch

CACHED = 20 << 20  # bytes of a decoded slab; the other 30 MB of the cache are for rows and results
RESULTS = 1 << 24  # of a slab at least: 512 tiles of 128 by 256, about four for each of H200's processors
THREADS = 256


def slab_rows(tokens: int, length: int) -> int:
    """Rows of a slab: what fits the cache, but enough to keep the device busy; a multiple of 128."""
    rows = max(CACHED // (2 * max(length, 1)), RESULTS // tokens)
    return max(128, rows // 128 * 128)


def decode(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """The first rows of a packed matrix, as many as `out` [rows, length] has, under their block scales."""
    slabs, tiles = out.shape[0] // SLAB, codes.shape[1]
    parameters = _cuda_launch.DECODE.pack(codes.data_ptr(), scales.data_ptr(), out.data_ptr(), slabs, out.shape[1])
    _cuda.launch("matmul", "decode_packed", (-(-slabs * tiles * 32 // THREADS),), THREADS, 0, parameters, out)


def run(a: Tensor, w: PackedNVFP4Tensor, bias: Tensor | None, out: Tensor, accumulate: bool) -> Tensor:
    """out [tokens, rows] = a @ w.T + bias, added to what is there with `accumulate`; fp32 until one rounding at the end."""
    rows, length = w.codes.shape[0] * SLAB, w.codes.shape[1] * 64
    most = min(rows, slab_rows(a.shape[0], length))
    values = torch.empty(most, length, dtype=torch.bfloat16, device=a.device)
    g = torch.where(w.global_scale.isfinite(), w.global_scale, float("nan"))
    for first in range(0, rows, most):
        slab = values[: min(most, rows - first)]
        decode(w.codes[first // SLAB :], w.scales[first // SLAB :], slab)
        part = slice(first, first + slab.shape[0])
        _finish(_product(a, slab[:, : a.shape[1]]), g, None if bias is None else bias[part], out[:, part], accumulate)
    return out


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in fp32. torch has products of 16-bit matrices with fp32 results on CUDA devices alone."""
    return torch.mm(a, b.t(), out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float().t()


def _finish(sums: Tensor, g: Tensor, bias: Tensor | None, out: Tensor, accumulate: bool) -> None:
    """One pass over the sums for a plain result; with bias or accumulation more, each step rounded as the kernels round it."""
    if bias is None and not accumulate:
        torch.mul(sums, g, out=out)
        return
    sums.mul_(g)
    if accumulate:
        out.add_(sums if bias is None else sums.add_(bias))
    else:
        torch.add(sums, bias, out=out)
