"""The pass over segments of Nano's mixer over 8,192 tokens; the other kernels of conv_scan are those of its two ops."""

import torch

from nvfp4_kernels.ops.conv_scan._in_turn import split
from nvfp4_kernels.ops.conv_scan._triton_segments import convolved
from nvfp4_kernels.ops.selective_scan._triton_call import prepare


def nano(packed: bool = False):
    tokens, heads, head_dim, groups, state = 8192, 64, 64, 8, 128
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state
    half = dict(dtype=torch.bfloat16, device="meta")
    _, xBC, dt = torch.empty(1, tokens, inner + channels + heads, **half).split((inner, channels, heads), -1)
    x, B, C = split(xBC, heads, groups, state)
    A, D, dt_bias = torch.empty(3, heads, device="meta")
    cu_seqlens = torch.empty(9, dtype=torch.int32, device="meta") if packed else None
    call = prepare(x, dt, A, B, C, D, dt_bias, None, cu_seqlens, True, 0.0, float("inf"), 128, passes=1)
    a, weight, bias = (torch.empty(*shape, device="meta") for shape in ((heads, 2, tokens), (inner, 4), (inner,)))
    convolved(call, a, weight, bias, torch.empty(8, inner, 3, **half) if packed else None, call.new_states())


CASES = {"Nano": nano, "Nano, packed, from states": lambda: nano(True)}
