"""width shifted products, over rows that each start with width - 1 inputs of history: zeros or the given state."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nvfp4_kernels.ops._check import boundaries


def refuses(*arguments) -> str | None:
    return None


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    history, ys, states = weight.shape[1] - 1, [], []
    for part, state in _sequences(cu_seqlens, initial_state, x):
        rows = _rows(part, state, history)
        pre = _convolve(rows, weight, bias)
        ys.append((F.silu(pre) if silu else pre).to(x.dtype))
        states.append(rows[:, rows.shape[1] - history :].transpose(1, 2).to(x.dtype))
    return torch.cat(ys, 1).view(x.shape), torch.cat(states).contiguous()


def backward(
    dy: Tensor,
    dstate: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and initial_state."""
    width = weight.shape[1]
    dxs, dinitials, dweight, dbias = [], [], 0, 0
    inputs = zip(_sequences(cu_seqlens, initial_state, x), _sequences(cu_seqlens, dstate, dy), strict=True)
    for (part, state), (dpre, dlast) in inputs:
        rows, dpre = _rows(part, state, width - 1), _wide(dpre)
        if silu:
            pre = _convolve(rows, weight, bias)
            sigmoid = torch.sigmoid(pre)
            dpre = dpre * sigmoid * (1 + pre * (1 - sigmoid))
        length = dpre.shape[1]
        drows = torch.zeros_like(rows)
        for k in range(width):
            drows[:, k : k + length] += dpre * weight[:, k]
        dweight = dweight + torch.stack([(rows[:, k : k + length] * dpre).sum((0, 1)) for k in range(width)], 1)
        dbias = dbias + dpre.sum((0, 1))
        if dlast is not None:
            drows[:, length:] += dlast.transpose(1, 2)
        dxs.append(drows[:, width - 1 :])
        dinitials.append(drows[:, : width - 1].transpose(1, 2))
    dinitial = None if initial_state is None else torch.cat(dinitials).to(initial_state.dtype)
    dbias = None if bias is None else dbias.to(bias.dtype)
    return torch.cat(dxs, 1).view(x.shape).to(x.dtype), dweight.to(weight.dtype), dbias, dinitial


def _sequences(cu_seqlens: Tensor | None, states: Tensor | None, x: Tensor):
    """(tokens, state or None) of each sequence; all at once where each row is a sequence."""
    if cu_seqlens is None:
        yield x, states
        return
    flat = x.reshape(1, -1, x.shape[2])
    bounds = boundaries(cu_seqlens, flat.shape[1])
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        yield flat[:, start:end], None if states is None else states[i : i + 1]


def _rows(x: Tensor, state: Tensor | None, history: int) -> Tensor:
    """[row, history + length, channels] in fp32 or fp64."""
    x = _wide(x)
    return F.pad(x, (0, 0, history, 0)) if state is None else torch.cat([state.transpose(1, 2).to(x.dtype), x], 1)


def _convolve(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    width = weight.shape[1]
    length = rows.shape[1] - width + 1
    y = sum(rows[:, k : k + length] * weight[:, k] for k in range(width))
    return y if bias is None else y + bias


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
