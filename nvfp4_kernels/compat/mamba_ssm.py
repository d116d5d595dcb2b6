"""The functions of mamba_ssm under their own names and arguments, on our kernels: any device, any length, any torch.

What an argument cannot mean here is an error that names it; nothing is ignored. seq_idx costs a read-back on GPUs (the number
of sequences); `cu_seqlens` of nk.selective_scan costs none.
"""

import math

import torch
from torch import Tensor

from nvfp4_kernels.autograd.plain import dense
from nvfp4_kernels.compat.packing import boundaries, first_of_rows
from nvfp4_kernels.ops._check import float_operand, floating_point, require
from nvfp4_kernels.ops._gate import gate
from nvfp4_kernels.ops.causal_conv1d.op import causal_conv1d, check_cu_seqlens
from nvfp4_kernels.ops.conv_scan.op import conv_scan
from nvfp4_kernels.ops.gated_rms_norm.op import gated_rms_norm
from nvfp4_kernels.ops.selective_scan.op import selective_scan
from nvfp4_kernels.ops.state_update.op import state_update


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """mamba_ssm.ops.triton.ssd_combined: x [batch, seqlen, nheads, headdim], dt [batch, seqlen, nheads], A [nheads], B and C
    [batch, seqlen, ngroups, dstate].

    seq_idx: int [batch, seqlen]; the state starts from zero where it changes, each row from its initial state.
    cu_seqlens: with return_varlen_states, batch 1: where sequences end that the states are wanted of; seq_idx may be left out.
    state_dtype: of the states returned; they are computed in fp32.
    Returns out [batch, seqlen, nheads, headdim], then final_states [batch, nheads, headdim, dstate] and varlen_states
    [sequences, nheads, headdim, dstate] where asked for. Raises TypeError or ValueError naming the argument.
    """
    floating_point("x", x)
    require(x.dim() == 4, "x", f"shape {list(x.shape)}", "[batch, seqlen, nheads, headdim]")
    require(not return_varlen_states or x.shape[0] == 1, "x", f"batch {x.shape[0]}", "1 with return_varlen_states")
    require(
        not return_varlen_states or cu_seqlens is not None, "cu_seqlens", "None", "boundaries with return_varlen_states"
    )
    require(
        return_varlen_states or cu_seqlens is None or seq_idx is not None,
        "cu_seqlens",
        "boundaries alone",
        "seq_idx beside it, or return_varlen_states=True",
    )
    bounds = cu_seqlens
    if bounds is not None:
        check_cu_seqlens(bounds, x)
    if seq_idx is not None:
        found = boundaries(seq_idx, *x.shape[:2])
        alike = cu_seqlens is None or torch.equal(torch.unique_consecutive(cu_seqlens).to(found.dtype), found)
        require(alike, "cu_seqlens", "other sequences than those of seq_idx", "the same, or one of the two")
        bounds = found if cu_seqlens is None else cu_seqlens
    state = initial_states
    if bounds is not None and initial_states is not None:
        wanted = (x.shape[0], *x.shape[2:], B.shape[-1])
        float_operand("initial_states", initial_states, wanted, x.device)
        first = first_of_rows(bounds, x.shape[0], x.shape[1])
        state = initial_states.new_zeros(bounds.numel() - 1, *initial_states.shape[1:]).index_copy(
            0, first, initial_states
        )
    y, last = selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state, True, bounds, chunk_size)
    last = last if state_dtype is None else last.to(state_dtype)
    results = [y]
    if return_final_states:
        results.append(last if bounds is None else last[_last_of_rows(bounds, x.shape[0], x.shape[1])])
    if return_varlen_states:
        results.append(last)
    return results[0] if len(results) == 1 else tuple(results)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """mamba_ssm.ops.triton.ssd_combined: a whole mixer from its projection zxbcdt [batch, seqlen, columns], the columns being
    MLP gate and value [mlp] each, z and x [dim], B and C [ngroups * dstate], dt [nheads].

    dim = nheads * headdim; D [nheads] with headdim given, or [nheads, headdim]. Without rmsnorm_weight z gates the scan; with
    it the norm has groups of dim / ngroups. Returns out [batch, seqlen, mlp + dim] or through outproj_weight, and the final
    states where asked for. Raises TypeError or ValueError naming the argument.
    """
    require(D.dim() == 2 or headdim is not None, "headdim", "None", "the head dimension, where D has one value a head")
    heads, head_dim = D.shape[0], D.shape[1] if D.dim() == 2 else headdim
    require(headdim in (None, head_dim), "headdim", headdim, f"{head_dim}, as D")
    require(
        outproj_bias is None or outproj_weight is not None, "outproj_bias", "a tensor", "None without outproj_weight"
    )
    inner = heads * head_dim
    shared = (conv1d_weight.shape[0] - inner) // 2
    mlp = (zxbcdt.shape[-1] - 2 * inner - 2 * shared - heads) // 2
    widths = (2 * mlp, inner, inner + 2 * shared, heads)
    require(
        mlp >= 0 and sum(widths) == zxbcdt.shape[-1] and shared % ngroups == 0,
        "zxbcdt",
        f"{zxbcdt.shape[-1]} columns",
        f"2 * {inner} + 2 * ngroups * dstate + {heads}, and an even number for an MLP",
    )
    first, z, xBC, dt = zxbcdt.split(widths, -1)
    bounds = None if seq_idx is None else boundaries(seq_idx, *zxbcdt.shape[:2])
    silu = "silu" if activation in ("silu", "swish") else activation
    if silu == "silu" and initial_states is None and not return_final_states:
        y, *_ = conv_scan(
            xBC, dt, conv1d_weight, conv1d_bias, A, D, dt_bias, ngroups, shared // ngroups, dt_limit, cu_seqlens=bounds,
            chunk_size=chunk_size,
        )  # fmt: skip
        states = None
    else:
        x, B, C = causal_conv1d(xBC, conv1d_weight, conv1d_bias, silu, cu_seqlens=bounds).split(
            (inner, shared, shared), -1
        )
        y, states = mamba_chunk_scan_combined(
            x.unflatten(-1, (heads, head_dim)), dt, A, B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1)),
            chunk_size, D, None, dt_bias, initial_states, seq_idx, None, True, dt_limit, True, state_dtype=state_dtype,
        )  # fmt: skip
    y = y.flatten(-2)
    if rmsnorm_weight is None:
        y = gate(y, z)
    else:
        y = gated_rms_norm(y, z, rmsnorm_weight, rmsnorm_eps, inner // ngroups, norm_before_gate)
    if mlp:
        gates, values = first.chunk(2, -1)
        y = torch.cat([gate(values, gates), y], -1)
    if outproj_weight is not None:
        y = dense(y.to(outproj_weight.dtype), outproj_weight, outproj_bias)
    return (y, states) if return_final_states else y


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """mamba_ssm.ops.triton.selective_state_update for Mamba-2: state [batch, nheads, headdim, dstate], in place; x, z [batch,
    nheads, headdim]; B, C [batch, ngroups, dstate], or [batch, dstate] for one group; dt as x and A [nheads, headdim, dstate],
    dt_bias, D [nheads, headdim], expanded from one value a head.

    state_batch_indices: int [batch], the slot of each row; -1: none. Returns out as x. Raises TypeError or ValueError naming
    the argument; so for A, dt or dt_bias of more than one value a head (Mamba-1): only a stride of 0 says so unread.
    """
    for name, t in (("dt", dt), ("A", A)):
        floating_point(name, t)
    for name, t, axes in (("A", A, (1, 2)), ("dt", dt, (2,)), ("dt_bias", dt_bias, (1,))):
        tied = t is None or all(t.dim() > axis and (t.stride(axis) == 0 or t.shape[axis] == 1) for axis in axes)
        strides = None if t is None else f"shape {list(t.shape)}, strides {list(t.stride())}"
        require(tied, name, strides, f"one value a head, expanded (stride 0) along axes {axes}")
    bias = None if dt_bias is None else dt_bias[:, 0]
    B, C = (t.unsqueeze(1) if isinstance(t, Tensor) and t.dim() == 2 else t for t in (B, C))
    no_limit = (-math.inf, math.inf)  # steps are clamped in the scan alone
    return state_update(
        state, x, dt[..., 0], A[:, 0, 0], B, C, D, z, bias, dt_softplus, no_limit, indices=state_batch_indices
    )


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """mamba_ssm.ops.triton.layernorm_gated: norm(x) * weight + bias, gated by silu(z) after the norm or before it."""
    if bias is None:
        return gated_rms_norm(x, z, weight, eps, group_size, norm_before_gate)
    float_operand("bias", bias, weight.shape, x.device)
    early = z is not None and not norm_before_gate
    y = (gated_rms_norm(x, z if early else None, weight, eps, group_size) + bias).to(x.dtype)
    return y if z is None or early else gate(y, z)


def _last_of_rows(bounds: Tensor, batch: int, length: int) -> Tensor:
    """The index of the sequence that ends each row."""
    ends = torch.arange(1, batch + 1, device=bounds.device, dtype=bounds.dtype) * length
    return torch.searchsorted(bounds, ends) - 1
