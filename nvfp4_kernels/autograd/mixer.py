"""Convolution, scan and gated norm of a Mamba-2 mixer as one function that keeps little: its input and the scan's output.

Left to autograd, the three would also keep the convolution's output, [tokens, channels], which costs one pass to form again.
"""

import torch
from torch import Tensor

import nvfp4_kernels.ops.causal_conv1d.op  # noqa: F401  (the three ops' registrations)
import nvfp4_kernels.ops.gated_rms_norm.op  # noqa: F401
import nvfp4_kernels.ops.selective_scan.op  # noqa: F401

ops = torch.ops.nvfp4


def mixer(
    z: Tensor,
    xBC: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    cu_seqlens: Tensor | None,
    groups: int,
    state: int,
    dt_limit: tuple[float, float],
    chunk_size: int,
    eps: float,
) -> Tensor:
    """gated_rms_norm(selective_scan(x, dt, A, B, C, D), z) of x, B, C = causal_conv1d(xBC): [batch, length, inner].

    z: [batch, length, inner]. xBC: [batch, length, inner + 2 * groups * state]. dt: [batch, length, heads]. conv_weight:
    [inner + 2 * groups * state, width]. A, D, dt_bias: [heads]. norm_weight: [inner]; `groups` share a mean square. The rest
    is as in the three ops, which check nothing here: this is called by nn.Mamba2 alone, with shapes it made itself.
    """
    shape = (A.shape[0], z.shape[-1] // A.shape[0], groups, state)
    options = (shape, *map(float, dt_limit), chunk_size, eps)
    return _Mixer.apply(z, xBC, dt, conv_weight, conv_bias, A, D, dt_bias, norm_weight, cu_seqlens, options)


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, xBC, dt, conv_weight, conv_bias, A, D, dt_bias, norm_weight, cu_seqlens, options):
        shape, low, high, chunk_size, eps = options
        x, B, C = _split(_conv(xBC, conv_weight, conv_bias, cu_seqlens), shape)
        y, _ = ops.selective_scan(x, dt, A, B, C, D, dt_bias, None, cu_seqlens, True, low, high, chunk_size)
        y = y.flatten(-2)
        ctx.save_for_backward(z, xBC, dt, conv_weight, conv_bias, A, D, dt_bias, norm_weight, cu_seqlens, y)
        ctx.options = options
        return ops.gated_rms_norm(y, z, norm_weight, eps, y.shape[-1] // shape[2], False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        z, xBC, dt, conv_weight, conv_bias, A, D, dt_bias, norm_weight, cu_seqlens, y = ctx.saved_tensors
        shape, low, high, chunk_size, eps = ctx.options
        dy, dz, dnorm = ops.gated_rms_norm_backward(dout, y, z, norm_weight, eps, y.shape[-1] // shape[2], False)
        x, B, C = _split(_conv(xBC, conv_weight, conv_bias, cu_seqlens), shape)
        steps = (True, low, high, chunk_size)
        dx, ddt, dA, dB, dC, dD, dbias, _ = ops.selective_scan_backward(
            dy.view(x.shape), None, x, dt, A, B, C, D, dt_bias, None, cu_seqlens, *steps
        )
        dconv = torch.cat([dx.flatten(-2), dB.flatten(-2), dC.flatten(-2)], -1)
        dxBC, dweight, dconv_bias, _ = ops.causal_conv1d_backward(
            dconv, None, xBC, conv_weight, conv_bias, None, cu_seqlens, True
        )
        dconv_bias = None if conv_bias is None else dconv_bias
        return dz, dxBC, ddt, dweight, dconv_bias, dA, dD, dbias, dnorm, None, None


def _conv(xBC: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    return ops.causal_conv1d(xBC, weight, bias, None, cu_seqlens, True)[0]


def _split(xBC: Tensor, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """x [batch, length, heads, head_dim], B and C [batch, length, groups, state], as views."""
    heads, head_dim, groups, state = shape
    x, B, C = xBC.split((heads * head_dim, groups * state, groups * state), -1)
    return x.unflatten(-1, (heads, head_dim)), B.unflatten(-1, (groups, state)), C.unflatten(-1, (groups, state))
