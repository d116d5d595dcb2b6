"""mixer_step through csrc/mixer_step: one call from Python for the three kernels."""

import torch
from torch import Tensor

from nvfp4_kernels.ops._native import DTYPES, check, empty, native, refuses_float


def refuses(projected: Tensor, windows: Tensor, states: Tensor, *rest) -> str | None:
    return refuses_float(projected) or refuses_float(states)


def run(
    projected, windows, states, conv_weight, conv_bias, A, D, dt_bias, norm_weight, indices, groups, low, high, eps
) -> Tensor:
    (batch, tokens, _), (slots, heads, head_dim, state), width = projected.shape, states.shape, conv_weight.shape[1]
    projected = projected.contiguous()
    weights = [conv_weight.t(), conv_bias, A, D, dt_bias, norm_weight]
    weights = [None if t is None else t.to(torch.float32).contiguous() for t in weights]
    indices = None if indices is None else indices.to(torch.int64).contiguous()
    y = empty(batch, tokens, heads * head_dim, dtype=projected.dtype)
    status = native.mixer_step(
        (DTYPES[projected.dtype], batch, tokens, heads, groups, head_dim, state, slots, width, DTYPES[states.dtype]),
        projected.data_ptr(),
        (windows.data_ptr(), states.data_ptr()),
        tuple(0 if t is None else t.data_ptr() for t in weights),
        0 if indices is None else indices.data_ptr(),
        (low, high, eps),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if status == 2:
        raise ValueError(f"indices: got a slot beyond the {slots} of states; allowed: -1 to {slots - 1}")
    check(status)
    return y
