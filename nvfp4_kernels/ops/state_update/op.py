"""state_update: the next token or tokens of selective_scan, the state changed in place."""

import math

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import float_operand, floating_point, integers, require, same_device
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._library import register
from nvfp4_kernels.ops.selective_scan.op import check_groups, check_per_head, limits


def state_update(
    state: Tensor,
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
    *,
    indices: Tensor | None = None,
    intermediate: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """state <- exp(A dt) state + dt x B^T;  returns y = state C + D x, times silu(z) where given.

    state: fp32, bf16, fp16 or fp64 [slots, heads, head_dim, state], written in place; slots = batch without indices.
    x: float [batch, heads, head_dim], or [batch, tokens, heads, head_dim] for several tokens, one after the other; dt, B, C
        and z then have the axis tokens too. dt: [batch, heads]. B, C: [batch, groups, state]. z: as x.
    A, dt_bias: [heads]. D: [heads] or [heads, head_dim]. dt_softplus, dt_limit: as in selective_scan.
    indices: int32 or int64 [batch], the slot of each row's state, no slot twice; -1: none, the row's y is 0 and its part of
        `intermediate` means nothing.
    intermediate: as state, [batch, tokens, heads, head_dim, state]: gets the state after each token, and `state` stays as
        it is: speculative decoding copies the state after the last accepted token into its slot.
    noise: int64 [2] (seed, offset), on the state's device: rounds a bf16 or fp16 state stochastically, token t with offset + t.
        The element at flat index e of [batch, heads, head_dim, state] takes the halfword e % 8 of the Philox4x32-10 draw
        e // 8 as r / 2^16, and rounds |v| to the multiple of the last place at or below |v| + r. None: to nearest.
    Math in fp32 (fp64 for fp64 x); the state is rounded once a token, y is not computed from the rounded one. Several tokens
    give the bits that as many calls with one token give. Returns y of the shape and dtype of x.
    Not differentiable: generation alone uses it. Raises TypeError or ValueError naming the argument.
    """
    floating_point("x", x)
    require(
        x.dim() in (3, 4), "x", f"shape {list(x.shape)}", "[batch, heads, head_dim] or [batch, tokens, heads, head_dim]"
    )
    batch, (heads, head_dim), lead = x.shape[0], x.shape[-2:], x.shape[:-2]
    check_groups(x, B, C)
    low, high = limits(dt_limit)
    float_operand("dt", dt, (*lead, heads), x.device)
    check_per_head(x, A, D, z, dt_bias)
    floating_point("state", state)
    each = (heads, head_dim, B.shape[-1])
    slots = state.shape[0] if indices is not None and state.dim() == 4 else batch
    float_operand("state", state, (slots, *each), x.device)
    if any(stride == 0 and size > 1 for size, stride in zip(state.shape, state.stride(), strict=True)):
        require(
            False, "state", f"strides {list(state.stride())}", "memory of its own for each element, for it is written"
        )
    if indices is not None:
        integers("indices", indices)
        if tuple(indices.shape) != (batch,):
            require(False, "indices", f"shape {list(indices.shape)}", f"[{batch}]")
        same_device("indices", indices, x.device)
    if intermediate is not None:
        tokens = lead if x.dim() == 4 else (batch, 1)
        float_operand("intermediate", intermediate, (*tokens, *each), x.device)
        require(
            intermediate.dtype == state.dtype, "intermediate", intermediate.dtype, f"{state.dtype}, as state", TypeError
        )
    if noise is not None:
        sixteen = state.dtype in (torch.bfloat16, torch.float16)
        require(sixteen, "noise", f"noise for {state.dtype}", "a 16-bit state", TypeError)
        require(isinstance(noise, Tensor), "noise", type(noise).__name__, "an int64 tensor", TypeError)
        right = noise.dtype == torch.int64 and tuple(noise.shape) == (2,)
        require(right, "noise", f"{noise.dtype} {list(noise.shape)}", "int64 [2]")
        same_device("noise", noise, x.device)
    if x.dim() == 3:
        x, dt, B, C, z = (None if t is None else t.unsqueeze(1) for t in (x, dt, B, C, z))
    y = torch.ops.nvfp4.state_update(
        state, x, dt, A, B, C, D, z, dt_bias, indices, intermediate, noise, dt_softplus, low, high
    )
    return y if len(lead) == 2 else y.squeeze(1)


def _run(*arguments) -> Tensor:
    return select("state_update", *arguments).run(*arguments)


def _fake(state, x, *rest) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register(
    "state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, Tensor? indices, Tensor(b!)? intermediate, Tensor? noise, bool dt_softplus, float low, float high) "
    "-> Tensor",
    _run,
    _fake,
)
