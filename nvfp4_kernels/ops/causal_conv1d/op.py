"""causal_conv1d: the short depthwise convolution over time in front of Mamba-2's scan, with its SiLU."""

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import float_operand, floating_point, integers, require, same_device
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._library import register_differentiable


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y[t] = activation(bias + sum_k weight[:, k] * x[t - width + 1 + k]), each channel by itself; zeros before the start.

    x: float [batch, length, channels], any strides. weight: [channels, width], width 2 to 4; its last column meets the
    current token. bias: [channels] or None. activation: "silu" or None.
    initial_state: [sequences, channels, width - 1], the inputs before the first, oldest first.
    cu_seqlens: int [sequences + 1], ascending from 0 to batch * length: where sequences start in the batch * length tokens
        taken row after row; no sequence sees another. None: each row is one.
    Returns y of the shape and dtype of x; with return_state also the state after each sequence, as initial_state.
    Differentiable in x, weight, bias and initial_state. All math in fp32 (fp64 for fp64 x), one rounding at the end.
    Raises TypeError or ValueError naming the argument.
    """
    floating_point("x", x)
    require(x.dim() == 3, "x", f"shape {list(x.shape)}", "[batch, length, channels]")
    channels = x.shape[2]
    floating_point("weight", weight)
    if weight.dim() != 2 or weight.shape[0] != channels:
        require(False, "weight", f"shape {list(weight.shape)}", f"[{channels}, width]")
    width = weight.shape[1]
    require(2 <= width <= 4, "weight", f"width {width}", "2, 3, 4")
    same_device("weight", weight, x.device)
    float_operand("bias", bias, (channels,), x.device, optional=True)
    require(activation in ("silu", None), "activation", repr(activation), "'silu', None")
    sequences = x.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x)
        sequences = cu_seqlens.numel() - 1
    float_operand("initial_state", initial_state, (sequences, channels, width - 1), x.device, optional=True)
    silu = activation == "silu"
    y, state = torch.ops.nvfp4.causal_conv1d(x, weight, bias, initial_state, cu_seqlens, silu)
    return (y, state) if return_state else y


def check_cu_seqlens(cu_seqlens: Tensor, x: Tensor) -> None:
    """`cu_seqlens` must be boundaries of the batch * length tokens of x [batch, length, ...]. Values are not read."""
    integers("cu_seqlens", cu_seqlens)
    require(
        cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 2,
        "cu_seqlens",
        f"shape {list(cu_seqlens.shape)}",
        "[sequences + 1]",
    )
    require(cu_seqlens.device == x.device, "cu_seqlens", f"device {cu_seqlens.device}", f"{x.device}, where x is")


def _run(*arguments) -> tuple[Tensor, Tensor]:
    return select("causal_conv1d", *arguments).run(*arguments)


def _backward(dy, dstate, x, *rest) -> tuple[Tensor | None, ...]:
    dy = torch.zeros_like(x) if dy is None else dy
    return select("causal_conv1d", x, *rest).backward(dy, dstate, x, *rest)


def _fake(x, weight, bias, initial_state, cu_seqlens, silu) -> tuple[Tensor, Tensor]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(sequences, weight.shape[0], weight.shape[1] - 1)


register_differentiable(
    "causal_conv1d",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool silu",
    2,
    _run,
    _fake,
    _backward,
    4,
)
