"""The random Hadamard transform in plain torch: x' = x @ (S H16 / 4) on each run of 16 along the last axis."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.layout import pad_last

BF16_MAX = 3.3895313892515355e38


def refuses(x: Tensor, signs: int) -> str | None:
    return None


def run(x: Tensor, signs: int) -> Tensor:
    """x [rows, cols] to bf16 [rows, ceil16(cols)]; signs: 16-bit mask, bit i set = sign i negative.

    Four butterfly stages in fp32, in a fixed order, so that every backend rounds alike. The factor 1/16 comes first and 4
    last: both exact, and sums of 16 values then never overflow. A finite result beyond bf16 saturates.
    """
    values = pad_last(x.to(torch.float32), 16) / 16
    minus = torch.tensor([signs >> i & 1 for i in range(16)], dtype=torch.float32, device=x.device)
    values = values.unflatten(-1, (-1, 16)) * (1 - 2 * minus)
    for stride in (1, 2, 4, 8):
        pairs = values.unflatten(-1, (8 // stride, 2, stride))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        values = torch.stack([a + b, a - b], dim=-2).flatten(-3)
    return (values * 4).clamp(-BF16_MAX, BF16_MAX).flatten(-2).to(torch.bfloat16)
