"""seq_idx, a number for each token that says which sequence it belongs to, as boundaries."""

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import require


def boundaries(seq_idx: Tensor, batch: int, length: int) -> Tensor:
    """int64 [sequences + 1]: where seq_idx [batch, length] changes and where rows start. Reads the count back on a GPU."""
    require(isinstance(seq_idx, Tensor), "seq_idx", type(seq_idx).__name__, "a tensor", TypeError)
    require(tuple(seq_idx.shape) == (batch, length), "seq_idx", f"shape {list(seq_idx.shape)}", f"[{batch}, {length}]")
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    where = starts.flatten().nonzero().flatten()
    return torch.cat([where, where.new_full((1,), seq_idx.numel())])


def first_of_rows(bounds: Tensor, batch: int, length: int) -> Tensor:
    """The index of the sequence that each row starts with: the last of those that begin there, the others being empty."""
    starts = torch.arange(batch, device=bounds.device, dtype=bounds.dtype) * length
    return torch.searchsorted(bounds[:-1].contiguous(), starts, right=True) - 1
