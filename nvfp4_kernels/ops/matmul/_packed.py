"""Whether a weight is to be kept packed: where the CUDA kernels read it in place, and only there."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.packed import LARGEST, SLAB, PackedNVFP4Tensor, pack
from nvfp4_kernels.formats.tensor import NVFP4Tensor
from nvfp4_kernels.ops import _cuda
from nvfp4_kernels.ops._dispatch import candidates, implementation


def packed(w: NVFP4Tensor, dtype: torch.dtype) -> PackedNVFP4Tensor | None:
    """`w` packed where kernels multiply a row of `dtype` by it so; None where they do not, or where it cannot be packed, or
    where Triton was measured to be faster with `w` as it is.

    Reads the block scales on the host, once: for when a model is loaded.
    """
    parts = packed_parts(w.codes, w.scales, dtype) if len(w.shape) == 2 else None
    return parts and PackedNVFP4Tensor(*parts, w.global_scale, w.shape, w.hadamard)


def packed_parts(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """As `packed`, the codes and scales of a matrix or of a stack of them, one for each expert."""
    if not _cuda.takes(codes) or codes.shape[-2] % SLAB or not codes.shape[:-1].numel():
        return None
    cols = 2 * codes.shape[-1]
    zeros = (torch.zeros_like(part.flatten(0, -2)[:SLAB]) for part in (codes, scales))
    slab = NVFP4Tensor(*zeros, torch.ones((), dtype=torch.float32, device=codes.device), (SLAB, cols))
    row = torch.empty(1, cols, dtype=dtype, device=codes.device)
    native = implementation("matmul", "native")
    first = candidates("matmul", (row, slab))[0]
    if first != "native" or native.refuses(row, PackedNVFP4Tensor.pack(slab), None, dtype, None, False):
        return None
    return None if (scales.view(torch.uint8) > LARGEST).any() else pack(codes, scales)
