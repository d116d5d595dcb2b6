"""conv_scan: causal_conv1d and the selective_scan behind it as one op, that keeps nothing of what is between them."""

import math

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import float_operand, floating_point, require
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._library import register_differentiable
from nvfp4_kernels.ops.causal_conv1d.op import check_cu_seqlens
from nvfp4_kernels.ops.selective_scan.op import limits, per_channel


def conv_scan(
    xBC: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    groups: int,
    state: int,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    conv_state: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 128,
) -> tuple[Tensor, Tensor, Tensor]:
    """selective_scan(x, dt, A, B, C, D, dt_bias=dt_bias) of x, B, C = causal_conv1d(xBC, conv_weight, conv_bias): their bits.

    xBC: float [batch, length, x + B + C], any strides: x heads * head_dim wide, B and C groups * state each.
    dt: [batch, length, heads]. conv_weight: [x + B + C, width], width 2 to 4; conv_bias: [x + B + C] or None.
    A: [heads]. D: [heads], [heads, head_dim] or None. dt_bias: [heads] or None.
    dt_limit, cu_seqlens, chunk_size: as in selective_scan.
    conv_state: [sequences, x + B + C, width - 1], the inputs of the convolution before the first, oldest first.
    initial_state: [sequences, heads, head_dim, state].
    Returns y [batch, length, heads, head_dim] and both states after each sequence; y and the convolution's state are of xBC's
    dtype, the scan's is fp32 (fp64 for fp64 xBC). Differentiable in every tensor but cu_seqlens; backward convolves again.
    Raises TypeError or ValueError naming the argument. Source: Mamba-2 (arXiv 2405.21060), section 7.
    """
    weights = conv_weight, conv_bias, A, D, dt_bias
    check(xBC, dt, *weights, groups, state, dt_limit, conv_state, initial_state, cu_seqlens, chunk_size)
    low, high = limits(dt_limit)
    return torch.ops.nvfp4.conv_scan(
        xBC, dt, *weights, conv_state, initial_state, cu_seqlens, groups, state, low, high, chunk_size
    )


def check(
    xBC, dt, conv_weight, conv_bias, A, D, dt_bias, groups, state, dt_limit, conv_state, initial_state, cu_seqlens,
    chunk_size,
) -> None:  # fmt: skip
    """Raise for what conv_scan, whose arguments these are, cannot mean."""
    floating_point("xBC", xBC)
    require(xBC.dim() == 3, "xBC", f"shape {list(xBC.shape)}", "[batch, length, channels]")
    batch, length, channels = xBC.shape
    for name, t in (("A", A), ("conv_weight", conv_weight)):
        floating_point(name, t)
        require(t.dim() > 0, name, "no axes", "[heads]" if name == "A" else "[channels, width]")
    heads, inner, width = A.shape[0], channels - 2 * groups * state, conv_weight.shape[-1]
    if groups < 1 or heads % groups:
        require(False, "groups", groups, f"a divisor of the {heads} heads of A")
    if inner < 0 or inner % heads:
        require(False, "xBC", f"{channels} channels", f"a multiple of {heads} and 2 * {groups} * {state}")
    require(2 <= width <= 4, "conv_weight", f"width {width}", "2, 3, 4")
    require(chunk_size >= 1, "chunk_size", chunk_size, "at least 1")
    sequences = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, xBC)
        sequences = cu_seqlens.numel() - 1
    device, skip = xBC.device, (heads, inner // heads) if per_channel(D) else (heads,)
    float_operand("dt", dt, (batch, length, heads), device)
    float_operand("conv_weight", conv_weight, (channels, width), device)
    float_operand("conv_bias", conv_bias, (channels,), device, optional=True)
    float_operand("A", A, (heads,), device)
    float_operand("D", D, skip, device, optional=True)
    float_operand("dt_bias", dt_bias, (heads,), device, optional=True)
    float_operand("conv_state", conv_state, (sequences, channels, width - 1), device, optional=True)
    float_operand("initial_state", initial_state, (sequences, heads, inner // heads, state), device, optional=True)


def _run(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return select("conv_scan", *arguments).run(*arguments)


def _backward(dy, dconv, dstate, *arguments) -> tuple[Tensor | None, ...]:
    if dy is None:
        dy = torch.zeros_like(_fake(*arguments)[0])
    return select("conv_scan", *arguments).backward(dy, dconv, dstate, *arguments)


def _fake(xBC, dt, weight, bias, A, D, dt_bias, conv_state, initial_state, cu_seqlens, groups, state, *options):
    heads, head_dim = A.shape[0], (xBC.shape[2] - 2 * groups * state) // A.shape[0]
    sequences = xBC.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = torch.float64 if xBC.dtype == torch.float64 else torch.float32
    return (
        xBC.new_empty(*xBC.shape[:2], heads, head_dim),
        xBC.new_empty(sequences, xBC.shape[2], weight.shape[1] - 1),
        xBC.new_empty(sequences, heads, head_dim, state, dtype=wide),
    )


register_differentiable(
    "conv_scan",
    "Tensor xBC, Tensor dt, Tensor conv_weight, Tensor? conv_bias, Tensor A, Tensor? D, Tensor? dt_bias, Tensor? conv_state, "
    "Tensor? initial_state, Tensor? cu_seqlens, int groups, int state, float low, float high, int chunk_size",
    3,
    _run,
    _fake,
    _backward,
    9,
)
