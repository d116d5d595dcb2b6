"""The scans of Nano's and Super's mixers over 8,192 tokens, half of Nano's heads, few enough that backward goes by segments,
Nemotron-Nano-v2's heads of 80 channels, packed, and fp32 at the largest state."""

import torch

from nvfp4_kernels.ops.selective_scan import triton


def scan(
    heads: int, head_dim: int, state: int = 128, dtype=torch.bfloat16, packed: bool = False, backward: bool = True
):
    tokens, groups = 8192, 8
    inner, shared = heads * head_dim, groups * state
    xBC = torch.empty(1, tokens, inner + 2 * shared, dtype=dtype, device="meta")  # as the convolution leaves them
    x, B, C = xBC.split((inner, shared, shared), -1)
    x, B, C = x.unflatten(-1, (heads, -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
    dt = torch.empty(1, tokens, heads, dtype=dtype, device="meta")
    A, D, dt_bias = torch.empty(3, heads, device="meta")
    cu_seqlens = torch.empty(9, dtype=torch.int32, device="meta") if packed else None
    arguments = (x, dt, A, B, C, D, dt_bias, None, cu_seqlens, True, 0.0, float("inf"), 128)
    y, _ = triton.run(*arguments)
    if backward:
        triton.backward(y, None, *arguments)


CASES = {
    "Nano": lambda: scan(64, 64),
    "Super": lambda: scan(128, 64, backward=False),
    "Nano's half": lambda: scan(32, 64),
    "Nano v2, packed": lambda: scan(128, 80, packed=True),
    "Nano, state 256, fp32": lambda: scan(64, 64, 256, torch.float32),
}
