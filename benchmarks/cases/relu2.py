"""Over the routed rows of 8,192 tokens: the hidden values of Nano's experts, weighted, and of Super's shared one, not."""

import torch

from nvfp4_kernels.ops.relu2 import triton


def both_ways(rows: int, features: int, weighted: bool):
    x, dy = torch.empty(2, rows, features, dtype=torch.bfloat16, device="meta")
    weights = torch.empty(rows, device="meta") if weighted else None
    triton.run(x, weights)
    triton.backward(dy, x, weights)


CASES = {
    "Nano experts": lambda: both_ways(8192 * 6, 1856, True),
    "Super shared": lambda: both_ways(8192, 5376, False),
}
