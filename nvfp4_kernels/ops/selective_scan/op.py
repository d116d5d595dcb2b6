"""selective_scan: the state-space recurrence of Mamba-2 over whole sequences."""

import math

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import float_operand, floating_point, integer, require, same_device
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._gate import gate
from nvfp4_kernels.ops._library import register_differentiable
from nvfp4_kernels.ops.causal_conv1d.op import check_cu_seqlens


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 128,
) -> Tensor | tuple[Tensor, Tensor]:
    """S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_t^T;  y_t = S_t C_t + D x_t, times silu(z_t) where given.

    x: float [batch, length, heads, head_dim]. dt: [batch, length, heads]; the step used is softplus(dt + dt_bias), clamped to
    dt_limit (dt_softplus=False: without the softplus). A: [heads], negative. B, C: [batch, length, groups, state], groups a
    divisor of heads; head h reads group h // (heads / groups). D: [heads], [heads, head_dim] or None. z: as x, or None.
    initial_state: [sequences, heads, head_dim, state], fp32 as a rule.
    cu_seqlens: int [sequences + 1], ascending from 0 to batch * length: where sequences start in the batch * length tokens
        taken row after row; each starts from its own initial state (zero). None: each row is one.
    chunk_size: tokens done as one matrix product; it changes speed and rounding, not the model.
    Any length, head_dim and state size. Returns y of the shape and dtype of x; with return_state also the state after each
    sequence, fp32 (fp64 for fp64 x). Differentiable in every tensor but cu_seqlens.
    Steps, decays and the passing of states are fp32; matrix products take their operands in x's dtype when it is bf16.
    Raises TypeError or ValueError naming the argument. Source: Mamba-2 (arXiv 2405.21060), section 6.
    """
    floating_point("x", x)
    require(x.dim() == 4, "x", f"shape {list(x.shape)}", "[batch, length, heads, head_dim]")
    batch, length, heads, head_dim = x.shape
    check_groups(x, B, C)
    low, high = limits(dt_limit)
    integer("chunk_size", chunk_size)
    require(chunk_size >= 1, "chunk_size", chunk_size, "at least 1")
    sequences = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x)
        sequences = cu_seqlens.numel() - 1
    float_operand("dt", dt, (batch, length, heads), x.device)
    check_per_head(x, A, D, z, dt_bias)
    float_operand("initial_state", initial_state, (sequences, heads, head_dim, B.shape[3]), x.device, optional=True)
    y, last = torch.ops.nvfp4.selective_scan(
        x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, low, high, chunk_size
    )
    y = y if z is None else gate(y, z)
    return (y, last) if return_state else y


def check_groups(x: Tensor, B: Tensor, C: Tensor) -> None:
    """B and C [..., groups, state] beside x [..., heads, head_dim]."""
    floating_point("B", B)
    if B.dim() != x.dim() or B.shape[:-2] != x.shape[:-2]:
        require(False, "B", f"shape {list(B.shape)}", f"{list(x.shape[:-2])} + [groups, state]")
    heads, groups = x.shape[-2], B.shape[-2]
    if groups < 1 or heads % groups:
        require(False, "B", f"{groups} groups", f"a divisor of {heads} heads")
    same_device("B", B, x.device)
    float_operand("C", C, B.shape, x.device)


def check_per_head(x: Tensor, A: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None) -> None:
    """What belongs to the heads of x [..., heads, head_dim], and its gate."""
    heads, head_dim = x.shape[-2:]
    float_operand("A", A, (heads,), x.device)
    float_operand("D", D, (heads, head_dim) if per_channel(D) else (heads,), x.device, optional=True)
    float_operand("z", z, x.shape, x.device, optional=True)
    float_operand("dt_bias", dt_bias, (heads,), x.device, optional=True)


def per_channel(D: Tensor | None) -> bool:
    """Whether the skip has a weight for each channel, [heads, head_dim]; if not, for each head."""
    return isinstance(D, Tensor) and D.dim() == 2


def limits(dt_limit: tuple[float, float]) -> tuple[float, float]:
    """The least and the largest step."""
    pair = isinstance(dt_limit, (tuple, list)) and len(dt_limit) == 2
    require(pair and dt_limit[0] <= dt_limit[1], "dt_limit", dt_limit, "(low, high), low <= high")
    return float(dt_limit[0]), float(dt_limit[1])


def _run(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, low, high, chunk_size):
    arguments = (x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, low, high, chunk_size)
    return select("selective_scan", *arguments).run(*arguments)


def _backward(dy, dstate, x, *rest):
    dy = torch.zeros_like(x) if dy is None else dy
    return select("selective_scan", x, *rest).backward(dy, dstate, x, *rest)


def _fake(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, low, high, chunk_size):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(sequences, *x.shape[2:], B.shape[3], dtype=wide)


register_differentiable(
    "selective_scan",
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? cu_seqlens, bool dt_softplus, float low, float high, int chunk_size",
    2,
    _run,
    _fake,
    _backward,
    8,
)
