"""gated_rms_norm: Mamba-2's output norm, RMS over groups of channels, of the gated scan."""

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import float_operand, floating_point, integer, number, require
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._library import register_differentiable, unobserved


def gated_rms_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """weight * rms_norm(x * silu(z)) over each group of channels; norm_before_gate: weight * rms_norm(x) * silu(z).

    x: float [..., channels], any strides. z: as x, or None for no gate. weight: float [channels].
    group_size: channels that share one mean square; None for all. All math in fp32 (fp64 for fp64 x), one rounding at the end.
    Returns the shape and dtype of x; differentiable in x, z and weight. Raises TypeError or ValueError naming the argument.
    Source: Mamba-2 (arXiv 2405.21060), section 7; mamba_ssm's layernorm_gated.
    """
    floating_point("x", x)
    require(x.dim() >= 1, "x", f"{x.dim()} dimensions", "at least 1")
    channels = x.shape[-1]
    group_size = channels if group_size is None else group_size
    integer("group_size", group_size)
    require(
        group_size >= 1 and channels % group_size == 0,
        "group_size",
        group_size,
        f"a divisor of {channels}, the channels of x",
    )
    number("eps", eps, least=0)
    float_operand("weight", weight, (channels,), x.device)
    float_operand("z", z, x.shape, x.device, optional=True)
    if z is not None:
        require(z.dtype == x.dtype, "z", z.dtype, f"{x.dtype}, as x", TypeError)
    run = _run if unobserved(x) else torch.ops.nvfp4.gated_rms_norm
    return run(x, z, weight, eps, group_size, norm_before_gate)


def _run(*arguments) -> Tensor:
    return select("gated_rms_norm", *arguments).run(*arguments)


def _backward(dy: Tensor, *arguments) -> tuple[Tensor | None, ...]:
    return select("gated_rms_norm", *arguments).backward(dy, *arguments)


def _fake(x: Tensor, *arguments) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register_differentiable(
    "gated_rms_norm",
    "Tensor x, Tensor? z, Tensor weight, float eps, int group_size, bool norm_before_gate",
    1,
    _run,
    _fake,
    _backward,
    3,
)
