"""The pass over segments of Nano's mixer over 8,192 tokens; the other kernels of conv_scan are those of its two ops."""

import torch

from nvfp4_kernels.ops.conv_scan import triton


def nano(packed: bool = False):
    tokens, heads, head_dim, groups, state = 8192, 64, 64, 8, 128
    inner, shared = heads * head_dim, groups * state
    channels = inner + 2 * shared
    half = dict(dtype=torch.bfloat16, device="meta")
    projected = torch.empty(1, tokens, inner + channels + heads, **half)
    _, xBC, dt = projected.split((inner, channels, heads), -1)
    weight, bias = torch.empty(channels, 4, device="meta"), torch.empty(channels, device="meta")
    A, D, dt_bias = torch.empty(3, heads, device="meta")
    conv_state = torch.empty(8, channels, 3, **half) if packed else None
    cu_seqlens = torch.empty(9, dtype=torch.int32, device="meta") if packed else None
    rules = groups, state, 0.0, float("inf"), 128
    triton.run(xBC, dt, weight, bias, A, D, dt_bias, conv_state, None, cu_seqlens, *rules)


CASES = {"Nano": nano, "Nano, packed, from states": lambda: nano(True)}
