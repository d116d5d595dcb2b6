"""Over 8,192 tokens: the output norm of Nano's and Super's mixers, a plain norm over Super's hidden size, the largest group."""

import torch

from nvfp4_kernels.ops.gated_rms_norm import triton


def both_ways(channels: int, group_size: int, gated: bool):
    x, dy = torch.empty(2, 8192, channels, dtype=torch.bfloat16, device="meta")
    z = x if gated else None
    weight = torch.empty(channels, device="meta")
    triton.run(x, z, weight, 1e-5, group_size, False)
    triton.backward(dy, x, z, weight, 1e-5, group_size, False)


CASES = {
    "Nano mixer": lambda: both_ways(4096, 512, True),
    "Super mixer": lambda: both_ways(8192, 1024, True),
    "Super hidden": lambda: both_ways(4096, 4096, False),
    "largest group": lambda: both_ways(triton.LARGEST, triton.LARGEST, True),
}
