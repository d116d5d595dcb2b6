"""The convolutions of Nano's and Super's mixers over 8,192 tokens, from a view of in_proj's output."""

import torch

from nvfp4_kernels.ops.causal_conv1d import triton


def both_ways(channels: int, width_of_in_proj: int, gate: int, dtype=torch.bfloat16, packed=False):
    x = torch.empty(1, 8192, width_of_in_proj, dtype=dtype, device="meta")[..., gate : gate + channels]
    weight, bias = torch.empty(channels, 4, device="meta"), torch.empty(channels, device="meta")
    cu_seqlens = torch.empty(9, dtype=torch.int32, device="meta") if packed else None
    initial = torch.empty(8, channels, 3, dtype=dtype, device="meta") if packed else None
    triton.run(x, weight, bias, initial, cu_seqlens, True)
    dy = torch.empty(1, 8192, channels, dtype=dtype, device="meta")
    triton.backward(dy, initial, x, weight, bias, initial, cu_seqlens, True)


CASES = {
    "Nano": lambda: both_ways(6144, 10304, 4096),
    "Nano packed": lambda: both_ways(6144, 10304, 4096, packed=True),
    "Super": lambda: both_ways(10240, 18560, 8192),
    "Nano fp32": lambda: both_ways(6144, 10304, 4096, torch.float32, packed=True),
}
