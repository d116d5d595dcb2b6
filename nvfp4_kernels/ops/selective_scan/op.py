"""selective_scan: the state-space recurrence of Mamba-2 over whole sequences."""

import math

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import floating_point, require, same_device
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
    require(tuple(dt.shape) == (batch, length, heads), "dt", f"shape {list(dt.shape)}", str([batch, length, heads]))
    require(
        B.dim() == 4 and B.shape[:2] == x.shape[:2],
        "B",
        f"shape {list(B.shape)}",
        f"[{batch}, {length}, groups, state]",
    )
    require(heads % max(B.shape[2], 1) == 0, "B", f"{B.shape[2]} groups", f"a divisor of {heads} heads")
    require(C.shape == B.shape, "C", f"shape {list(C.shape)}", f"{list(B.shape)}, as B")
    check_per_head(x, A, D, z, dt_bias)
    require(dt_limit[0] <= dt_limit[1], "dt_limit", dt_limit, "(low, high), low <= high")
    require(chunk_size >= 1, "chunk_size", chunk_size, "at least 1")
    sequences = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x)
        sequences = cu_seqlens.numel() - 1
    if initial_state is not None:
        shape = (sequences, heads, head_dim, B.shape[3])
        require(
            tuple(initial_state.shape) == shape, "initial_state", f"shape {list(initial_state.shape)}", str(list(shape))
        )
    given = dict(dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state)
    for name, t in given.items():
        if t is not None:
            same_device(name, t, x.device)
    low, high = map(float, dt_limit)
    y, last = torch.ops.nvfp4.selective_scan(
        x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, low, high, chunk_size
    )
    y = y if z is None else gate(y, z)
    return (y, last) if return_state else y


def check_per_head(x: Tensor, A: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None) -> None:
    """What belongs to the heads of x [..., heads, head_dim], and its gate."""
    heads, head_dim = x.shape[-2:]
    require(tuple(A.shape) == (heads,), "A", f"shape {list(A.shape)}", f"[{heads}]")
    if D is not None:
        require(
            tuple(D.shape) in ((heads,), (heads, head_dim)),
            "D",
            f"shape {list(D.shape)}",
            f"[{heads}] or [{heads}, {head_dim}]",
        )
    if z is not None:
        require(z.shape == x.shape, "z", f"shape {list(z.shape)}", f"{list(x.shape)}, as x")
    if dt_bias is not None:
        require(tuple(dt_bias.shape) == (heads,), "dt_bias", f"shape {list(dt_bias.shape)}", f"[{heads}]")


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
