"""mixer_step: the next tokens through all that lies between a Mamba-2 mixer's two projections, states changed in place."""

import math

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import require, same_device
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._library import register, unobserved


def mixer_step(
    projected: Tensor,
    windows: Tensor,
    states: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    groups: int,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    eps: float = 1e-5,
    indices: Tensor | None = None,
) -> Tensor:
    """gated_rms_norm(state_update(causal_conv1d(x B C), dt), z): the bits of these three ops, for the price of one call.

    projected: bf16, fp16 or fp32 [batch, tokens, z + x + B + C + dt], the rows of in_proj: z and x heads * head_dim wide, B
        and C groups * state, dt heads.
    windows: [slots, channels, width - 1] of projected's dtype, the last inputs of the convolution over x, B and C, oldest
        first. states: fp32, bf16 or fp16 [slots, heads, head_dim, state]. Both contiguous, written in place.
    conv_weight: [channels, width]; conv_bias: [channels] or None. A, D, dt_bias: [heads]. norm_weight: [heads * head_dim].
    groups: of B and C, and of the norm. dt_limit: of softplus(dt + dt_bias).
    indices: int32 or int64 [batch], the slot of each row, no slot twice; -1: none, the row's y is 0. None: slot b for row b.
    Returns y [batch, tokens, heads * head_dim] of projected's dtype. Not differentiable: generation alone uses it.
    Raises TypeError or ValueError naming the argument. Source: Mamba-2 (arXiv 2405.21060), section 7.
    """
    for name, t, axes in (
        ("projected", projected, "[batch, tokens, features]"), ("states", states, "[slots, heads, head_dim, state]"),
    ):  # fmt: skip
        if t.dim() != axes.count(",") + 1:  # no words are put together for what is right: a decoded token would feel it
            require(False, name, f"shape {list(t.shape)}", axes)
    slots, heads, head_dim, state = states.shape
    batch, inner, shared = projected.shape[0], heads * head_dim, groups * state
    channels, width = inner + 2 * shared, conv_weight.shape[-1]
    require(groups >= 1 and heads % groups == 0, "groups", groups, f"a divisor of the {heads} heads of states")
    require(2 <= width <= 4, "conv_weight", f"width {width}", "2, 3, 4")
    require(dt_limit[0] <= dt_limit[1], "dt_limit", dt_limit, "(low, high), low <= high")
    require(indices is not None or slots == batch, "states", f"{slots} slots", f"{batch}, the batch, without indices")
    wanted = (
        ("projected", projected, (*projected.shape[:2], inner + channels + heads)),
        ("windows", windows, (slots, channels, width - 1)),
        ("conv_weight", conv_weight, (channels, width)),
        ("conv_bias", conv_bias, (channels,)),
        ("A", A, (heads,)),
        ("D", D, (heads,)),
        ("dt_bias", dt_bias, (heads,)),
        ("norm_weight", norm_weight, (inner,)),
        ("indices", indices, (batch,)),
    )
    for name, t, shape in wanted:
        if t is not None and (t.shape != shape or t.device != projected.device):
            require(t.shape == shape, name, f"shape {list(t.shape)}", str(list(shape)))
            require(False, name, f"device {t.device}", f"{projected.device}, as projected")
    require(projected.is_floating_point(), "projected", projected.dtype, "a floating-point tensor", TypeError)
    same_device("states", states, projected.device)
    require(windows.dtype == projected.dtype, "windows", windows.dtype, f"{projected.dtype}, as projected", TypeError)
    for name, t in (("windows", windows), ("states", states)):
        if not t.is_contiguous():
            require(False, name, f"strides {list(t.stride())}", "contiguous memory")
    if indices is not None:
        require(indices.dtype in (torch.int32, torch.int64), "indices", indices.dtype, "int32, int64", TypeError)
    weights = (conv_weight, conv_bias, A, D, dt_bias, norm_weight)
    low, high = map(float, dt_limit)
    run = _run if unobserved(projected) else torch.ops.nvfp4.mixer_step
    return run(projected, windows, states, *weights, indices, groups, low, high, float(eps))


def _run(*arguments) -> Tensor:
    return select("mixer_step", *arguments).run(*arguments)


def _fake(projected, windows, states, *rest) -> Tensor:
    return projected.new_empty(*projected.shape[:2], states.shape[1] * states.shape[2])


register(
    "mixer_step(Tensor projected, Tensor(a!) windows, Tensor(b!) states, Tensor conv_weight, Tensor? conv_bias, Tensor A, "
    "Tensor D, Tensor dt_bias, Tensor norm_weight, Tensor? indices, SymInt groups, float low, float high, float eps) -> Tensor",
    _run,
    _fake,
)
