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
    slots = torch.arange(len(states), device=states.device) if indices is None else indices.long()
    used = (slots >= 0).nonzero().flatten()
    window = windows[slots.clamp(min=0)].masked_fill((slots < 0)[:, None, None], 0)
    xBC, window = causal_conv1d(xBC, conv_weight, conv_bias, "silu", window, True)
    x, B, C = xBC.split((inner, shared, shared), -1)
    x, B, C = (t.unflatten(-1, (n, -1)) for t, n in ((x, heads), (B, groups), (C, groups)))
    y = state_update(states, x, dt, A, B, C, D, dt_bias=dt_bias, dt_limit=(low, high), indices=indices)
    windows[slots[used]] = window[used]
    return gated_rms_norm(y.flatten(-2), z, norm_weight, eps, inner // groups)
