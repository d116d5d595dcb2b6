"""The transform over 8,192 tokens of 4,096 channels, by rows and by columns, and over single tokens."""

import torch

from nvfp4_kernels.ops.hadamard import triton

CASES = {
    "8192x4096": lambda: triton.run(torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta"), 0xD7E8),
    "8192x4096 transposed": lambda: triton.run(
        torch.empty(4096, 8192, dtype=torch.bfloat16, device="meta").t(), 0xD7E8
    ),
    "1x4096": lambda: triton.run(torch.empty(1, 4096, dtype=torch.bfloat16, device="meta"), 0xD7E8),
    "16x4096 fp32": lambda: triton.run(torch.empty(16, 4096, device="meta"), 0xD7E8),
}
