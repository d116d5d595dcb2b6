"""The three ops behind one another, with windows and states taken from their slots and put back."""

import torch
from torch import Tensor

from nvfp4_kernels.ops.causal_conv1d.op import causal_conv1d
from nvfp4_kernels.ops.gated_rms_norm.op import gated_rms_norm
from nvfp4_kernels.ops.state_update.op import state_update


def refuses(*arguments) -> str | None:
    return None


@torch.no_grad()
def run(
    projected, windows, states, conv_weight, conv_bias, A, D, dt_bias, norm_weight, indices, groups, low, high, eps
) -> Tensor:
    heads, head_dim, state = states.shape[1:]
    inner, shared = heads * head_dim, groups * state
    z, xBC, dt = projected.split((inner, inner + 2 * shared, heads), -1)
    slots = None if indices is None else indices.long()
    window = windows if slots is None else windows[slots.clamp(min=0)].masked_fill((slots < 0)[:, None, None], 0)
    xBC, window = causal_conv1d(xBC, conv_weight, conv_bias, "silu", window, True)
    x, B, C = xBC.split((inner, shared, shared), -1)
    x, B, C = (t.unflatten(-1, (n, -1)) for t, n in ((x, heads), (B, groups), (C, groups)))
    y = state_update(states, x, dt, A, B, C, D, dt_bias=dt_bias, dt_limit=(low, high), indices=indices)
    if slots is None:
        windows.copy_(window)
    else:  # rows without a slot write to one that is dropped: to pick the others, the host would have to know them
        room = torch.cat((windows, windows[:1]))
        room[slots.masked_fill(slots < 0, len(windows))] = window
        windows.copy_(room[:-1])
    return gated_rms_norm(y.flatten(-2), z, norm_weight, eps, inner // groups)
