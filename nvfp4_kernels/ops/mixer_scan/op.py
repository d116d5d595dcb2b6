"""mixer_scan: all that lies between a Mamba-2 mixer's two projections, over whole sequences: conv_scan, gate and norm."""

import math

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import float_operand, floating_point, no_grad, number, require
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._library import register, unobserved
from nvfp4_kernels.ops.conv_scan.op import check
from nvfp4_kernels.ops.selective_scan.op import limits


def mixer_scan(
    xBC: Tensor,
    z: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    groups: int,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    eps: float = 1e-5,
    conv_state: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 128,
) -> tuple[Tensor, Tensor, Tensor]:
    """gated_rms_norm(y, z, norm_weight, eps) over groups of channels, of y and the states of conv_scan.

    xBC: float [batch, length, x + B + C], any strides: x heads * head_dim wide, B and C groups * state each.
    z: [batch, length, heads * head_dim] of xBC's dtype. dt: [batch, length, heads]. conv_weight: [x + B + C, width], width
        2 to 4; conv_bias: [x + B + C] or None. A, D, dt_bias: [heads]. norm_weight: [heads * head_dim].
    groups: of B and C, and of the norm. dt_limit, conv_state, initial_state, cu_seqlens, chunk_size: as in conv_scan.
    Returns y [batch, length, heads * head_dim] and both states after each sequence, as conv_scan: its bits and those of
    gated_rms_norm but in CUDA, where y is not rounded before the norm and chunks are of 64 tokens.
    No gradients: the two ops have them. Raises TypeError, ValueError or RuntimeError naming the argument.
    Source: Mamba-2 (arXiv 2405.21060), section 7.
    """
    for name, t, axes in (("xBC", xBC, 3), ("z", z, 3), ("A", A, 1)):
        floating_point(name, t)
        require(t.dim() == axes, name, f"{t.dim()} dimensions", str(axes))
    no_grad("xBC", xBC, "conv_scan and gated_rms_norm differentiate")
    (batch, length, channels), heads, inner = xBC.shape, A.shape[0], z.shape[2]
    if groups < 1 or heads % groups:
        require(False, "groups", groups, f"a divisor of the {heads} heads of A")
    state = (channels - inner) // (2 * groups)
    if inner % heads or state < 0 or inner + 2 * groups * state != channels:
        allowed = f"a multiple of {heads}, {channels} less a multiple of 2 * {groups}"
        require(False, "z", f"{inner} channels", allowed)
    weights = conv_weight, conv_bias, A, D, dt_bias
    check(xBC, dt, *weights, groups, state, dt_limit, conv_state, initial_state, cu_seqlens, chunk_size)
    wanted = ("z", z, (batch, length, inner)), ("norm_weight", norm_weight, (inner,)), ("D", D, (heads,))
    for name, t, shape in (*wanted, ("dt_bias", dt_bias, (heads,))):
        float_operand(name, t, shape, xBC.device)
    require(z.dtype == xBC.dtype, "z", z.dtype, f"{xBC.dtype}, as xBC", TypeError)
    number("eps", eps, least=0)
    low, high = limits(dt_limit)
    run = _run if unobserved(xBC) else torch.ops.nvfp4.mixer_scan
    options = groups, low, high, float(eps), chunk_size
    return run(xBC, z, dt, *weights, norm_weight, conv_state, initial_state, cu_seqlens, *options)


def _run(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return select("mixer_scan", *arguments).run(*arguments)


def _fake(
    xBC, z, dt, weight, bias, A, D, dt_bias, norm_weight, conv_state, initial_state, cu_seqlens, groups, *options
):
    heads, head_dim = A.shape[0], z.shape[2] // A.shape[0]
    sequences = xBC.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = torch.float64 if xBC.dtype == torch.float64 else torch.float32
    return (
        torch.empty_like(z, memory_format=torch.contiguous_format),
        xBC.new_empty(sequences, xBC.shape[2], weight.shape[1] - 1),
        xBC.new_empty(sequences, heads, head_dim, (xBC.shape[2] - z.shape[2]) // (2 * groups), dtype=wide),
    )


register(
    "mixer_scan(Tensor xBC, Tensor z, Tensor dt, Tensor conv_weight, Tensor? conv_bias, Tensor A, Tensor D, Tensor dt_bias, "
    "Tensor norm_weight, Tensor? conv_state, Tensor? initial_state, Tensor? cu_seqlens, int groups, float low, float high, "
    "float eps, int chunk_size) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
