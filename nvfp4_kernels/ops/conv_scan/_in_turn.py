"""Convolution, then scan, forward and backward, by the modules of one backend."""

from types import ModuleType

import torch
from torch import Tensor


def split(xBC: Tensor, heads: int, groups: int, state: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [batch, length, heads, head_dim], B and C [batch, length, groups, state], as views."""
    shared = groups * state
    x, B, C = xBC.split((xBC.shape[2] - 2 * shared, shared, shared), -1)
    return x.unflatten(-1, (heads, -1)), B.unflatten(-1, (groups, state)), C.unflatten(-1, (groups, state))


def refuses(conv: ModuleType, scan: ModuleType, *arguments) -> str | None:
    given, then = _arguments(*arguments)
    return conv.refuses(*given) or scan.refuses(*then(given[0]))


def run(conv: ModuleType, scan: ModuleType, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    given, then = _arguments(*arguments)
    mixed, conv_last = conv.run(*given)
    y, last = scan.run(*then(mixed))
    return y, conv_last, last


def backward(conv: ModuleType, scan: ModuleType, dy, dconv, dstate, *arguments) -> tuple[Tensor | None, ...]:
    """The gradients of xBC, dt, conv_weight, conv_bias, A, D, dt_bias, conv_state and initial_state."""
    given, then = _arguments(*arguments)
    dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial = scan.backward(dy, dstate, *then(conv.run(*given)[0]))
    dmixed = torch.cat([t.flatten(2) for t in (dx, dB, dC)], -1)
    dxBC, dweight, dbias, dconv_state = conv.backward(dmixed, dconv, *given)
    return dxBC, ddt, dweight, dbias, dA, dD, ddt_bias, dconv_state, dinitial


def _arguments(
    xBC, dt, weight, bias, A, D, dt_bias, conv_state, initial_state, cu_seqlens, groups, state, low, high, chunk_size
):
    """What the convolution takes, and what the scan does, by the convolution's output."""

    def then(mixed: Tensor) -> tuple:
        x, B, C = split(mixed, A.shape[0], groups, state)
        return x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, True, low, high, chunk_size

    return (xBC, weight, bias, conv_state, cu_seqlens, True), then
