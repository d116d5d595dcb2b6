"""Whether a weight is to be kept packed: where the CUDA kernels read it in place, and only there."""

import torch

from nvfp4_kernels.formats.packed import SLAB, PackedNVFP4Tensor
from nvfp4_kernels.formats.tensor import NVFP4Tensor
from nvfp4_kernels.ops import _cuda
from nvfp4_kernels.ops._dispatch import candidates, implementation

_LARGEST = 126  # of the codes of block scales: 127 is NaN, larger ones are negative


def packed(w: NVFP4Tensor, dtype: torch.dtype) -> PackedNVFP4Tensor | None:
    """`w` packed where kernels multiply a row of `dtype` by it so; None where they do not, or where it cannot be packed.

    Reads the block scales on the host, once: for when a model is loaded.
    """
    if not _cuda.takes(w.codes) or len(w.shape) != 2 or w.shape[0] % SLAB or not w.shape[0]:
        return None
    slab = PackedNVFP4Tensor.pack(
        NVFP4Tensor(w.codes[:SLAB], torch.zeros_like(w.scales[:SLAB]), w.global_scale, (SLAB, w.shape[1]), w.hadamard)
    )
    row = torch.empty(1, w.shape[1], dtype=dtype, device=w.device)
    native = implementation("matmul", "native")
    if "native" not in candidates("matmul") or native.refuses(row, slab, None, dtype, None, False):
        return None
    return None if (w.scales.view(torch.uint8) > _LARGEST).any() else PackedNVFP4Tensor.pack(w)
