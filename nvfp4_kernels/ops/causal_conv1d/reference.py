"""One depthwise convolution over rows that each start with width - 1 inputs of history: zeros or the given state.

Rows lie channels-last, [row, length, channels]: as an image of height 1 that is the layout which oneDNN convolves in place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def refuses(x, weight, bias, activation, initial_state, return_state, cu_seqlens) -> str | None:
    return None


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    batch, length, channels = x.shape
    history = weight.shape[1] - 1
    if cu_seqlens is not None:
        starts = cu_seqlens.long()
        tokens = torch.arange(batch * length, device=x.device)
        sequence = torch.bucketize(tokens, starts[1:], right=True)
        x, places = x.reshape(1, -1, channels), tokens + history * (sequence + 1)
    if initial_state is None and cu_seqlens is None:
        rows = F.pad(x, (0, 0, history, 0))
    elif cu_seqlens is None:
        rows = torch.cat([initial_state.transpose(1, 2).to(x.dtype), x], 1)
    else:
        rows = _spread(x[0], places, starts, initial_state, history)
    y = _Conv.apply(rows, weight, bias, activation)
    if cu_seqlens is not None:
        y = y[0].index_select(0, places - history).view(batch, length, channels)
    if not return_state:
        return y
    if cu_seqlens is None:
        return y, rows[:, -history:].transpose(1, 2)
    ends = starts[1:] + history * torch.arange(1, starts.numel(), device=x.device)
    return y, rows[0][ends[:, None] + torch.arange(-history, 0, device=x.device)].transpose(1, 2)


def _spread(x: Tensor, places: Tensor, starts: Tensor, initial_state: Tensor | None, history: int) -> Tensor:
    """All sequences in one row, each behind its own history."""
    sequences = starts.numel() - 1
    row = x.new_zeros(x.shape[0] + sequences * history, x.shape[1]).index_copy(0, places, x)
    if initial_state is not None:
        heads = starts[:-1, None] + history * torch.arange(sequences, device=x.device)[:, None]
        heads = (heads + torch.arange(history, device=x.device)).view(-1)
        row = row.index_copy(0, heads, initial_state.transpose(1, 2).reshape(-1, x.shape[1]).to(x.dtype))
    return row[None]


class _Conv(torch.autograd.Function):
    """Forward and the gradient of the input by oneDNN; that of the weight as sums of products, which beats oneDNN's 3x."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        pre = _convolve(rows, weight, bias)
        ctx.save_for_backward(rows, weight, pre if activation else None)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.silu(pre) if activation else pre

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        rows, weight, pre = ctx.saved_tensors
        dpre = dy if pre is None else torch.ops.aten.silu_backward(dy, pre)
        width, length = weight.shape[1], dy.shape[1]
        drows = (
            _convolve(F.pad(dpre, (0, 0, width - 1, width - 1)), weight.flip(1), None)
            if ctx.needs_input_grad[0]
            else None
        )
        dweight = torch.stack([_sum_tokens(rows[:, k : k + length] * dpre) for k in range(width)], 1).to(weight.dtype)
        dbias = None if ctx.bias_dtype is None else _sum_tokens(dpre).to(ctx.bias_dtype)
        return drows, dweight, dbias, None


def _convolve(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    image = rows.transpose(1, 2).unsqueeze(2)  # [row, channels, 1, length], channels-last
    kernel = weight.to(rows.dtype)[:, None, None, :]
    y = F.conv2d(image, kernel, None if bias is None else bias.to(rows.dtype), groups=rows.shape[2])
    return y.squeeze(2).transpose(1, 2)


def _sum_tokens(x: Tensor) -> Tensor:
    """[channels] of [row, length, channels]; as a product with ones, whose sums run in fp32 and on all threads."""
    x = x.reshape(-1, x.shape[-1])
    return (x.new_ones(1, x.shape[0]) @ x)[0]
