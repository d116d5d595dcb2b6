"""RMSNorm, plain and gated: statistics and weight in fp32, one rounding at the end."""

import torch
from torch import Tensor, nn

from nvfp4_kernels.ops.gated_rms_norm.op import gated_rms_norm


class RMSNorm(nn.Module):
    """y = weight * x / rms(x) over groups of `group_size` of the last axis; a gate z multiplies x by silu(z) first."""

    def __init__(self, size: int, eps: float = 1e-5, group_size: int | None = None, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32, device=device))
        self.eps, self.group_size = eps, group_size

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return gated_rms_norm(x, z, self.weight, self.eps, self.group_size)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, group_size={self.group_size}"
