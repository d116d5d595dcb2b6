"""The functions of causal-conv1d under their own names and arguments: channels before time, [batch, dim, seqlen]."""

import torch
from torch import Tensor

from nvfp4_kernels.compat.packing import boundaries
from nvfp4_kernels.ops._check import float_operand, floating_point, integers, require
from nvfp4_kernels.ops.causal_conv1d.op import causal_conv1d


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x [batch, dim, seqlen], best as a transposed view of [batch, seqlen, dim], which is read without a copy; weight [dim,
    width]; seq_idx int [batch, seqlen], tokens of -1 giving zeros; initial_states [batch, dim, width - 1].

    Returns out as x, and final_states [batch, dim, width - 1] where asked for (in final_states_out where given).
    Raises TypeError or ValueError naming the argument.
    """
    floating_point("x", x)
    require(x.dim() == 3, "x", f"shape {list(x.shape)}", "[batch, dim, seqlen]")
    require(
        seq_idx is None or (initial_states is None and not return_final_states),
        "seq_idx",
        "packed sequences with initial or final states",
        "one of them; nk.causal_conv1d has both by cu_seqlens",
    )
    require(
        final_states_out is None or return_final_states, "final_states_out", "a tensor", "None, or return_final_states"
    )
    bounds = None if seq_idx is None else boundaries(seq_idx, x.shape[0], x.shape[2])
    y, last = causal_conv1d(x.transpose(1, 2), weight, bias, _silu(activation), initial_states, True, bounds)
    y = y if seq_idx is None else y.masked_fill((seq_idx < 0)[..., None], 0)
    if not return_final_states:
        return y.transpose(1, 2)
    float_operand("final_states_out", final_states_out, last.shape, x.device, optional=True)
    return y.transpose(1, 2), last if final_states_out is None else final_states_out.copy_(last)


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The next token or tokens: x [batch, dim] or [batch, dim, seqlen]; conv_state [slots, dim, state_len], state_len at least
    width - 1, in place.

    cache_seqlens: int [batch], tokens so far: conv_state is then a ring, token t at t % state_len.
    conv_state_indices: int [batch], the slot of each row, no slot twice; below 0: none, the row's out is 0.
    Returns out as x, without gradients. Raises ValueError naming the argument.
    """
    floating_point("x", x)
    floating_point("weight", weight)
    require(x.dim() in (2, 3), "x", f"shape {list(x.shape)}", "[batch, dim] or [batch, dim, seqlen]")
    floating_point("conv_state", conv_state)
    tokens = x[..., None] if x.dim() == 2 else x
    (batch, dim), history, length = x.shape[:2], weight.shape[-1] - 1, conv_state.shape[-1]
    require(length >= history, "conv_state", f"state_len {length}", f"at least {history}, the width - 1")
    for name, index in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if index is not None:
            integers(name, index)
            require(tuple(index.shape) == (batch,), name, f"shape {list(index.shape)}", f"[{batch}]")
    slots = conv_state_indices
    rows = batch if slots is None else conv_state.shape[0]
    float_operand("conv_state", conv_state, (rows, dim, length), x.device)
    require(
        cache_seqlens is None or tokens.shape[2] <= length,
        "x",
        f"{tokens.shape[2]} tokens",
        f"at most {length}, the length of the ring",
    )
    state = conv_state if slots is None else conv_state[slots.clamp(min=0).long()]
    if cache_seqlens is None:
        past, after = state[..., length - history :], torch.cat([state, tokens.to(state.dtype)], -1)[..., -length:]
    else:
        steps = torch.arange(-history, tokens.shape[2], device=x.device)
        places = ((cache_seqlens.long()[:, None] + steps) % length)[:, None].expand(-1, state.shape[1], -1)
        past = state.gather(2, places[..., :history])
        after = state.scatter(2, places[..., history:], tokens.to(state.dtype))
    y = causal_conv1d(tokens.transpose(1, 2), weight, bias, _silu(activation), past).transpose(1, 2)
    if slots is None:
        conv_state.copy_(after)
    else:
        used = (slots >= 0)[:, None, None]
        y = y.masked_fill(~used, 0)
        _put(conv_state, slots, torch.where(used, after, state))
    return y.view(x.shape) if x.dim() == 2 else y


def _put(conv_state: Tensor, slots: Tensor, rows: Tensor) -> None:
    """conv_state[slots] = rows where a slot is one; the others write once more what such a row writes, so that nobody has to
    tell the host which they are. Where no slot is one, all write what slot 0 holds."""
    used = slots >= 0
    source = torch.where(used, torch.arange(len(slots), device=slots.device), used.int().argmax())
    conv_state.index_copy_(0, slots.clamp(min=0).long()[source], rows[source])


def _silu(activation: str | None) -> str | None:
    require(activation in (None, "silu", "swish"), "activation", repr(activation), "None, 'silu', 'swish'")
    return None if activation is None else "silu"
