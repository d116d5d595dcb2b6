"""u = x silu(z); y = w u / rms(u) by groups, or the gate behind the norm. `backward` forms u and rms(u) again."""

import torch
import torch.nn.functional as F
from torch import Tensor


def refuses(*arguments) -> str | None:
    return None


def run(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool) -> Tensor:
    wide, gate = _wide(x), None if z is None else F.silu(_wide(z))
    u = wide if gate is None or norm_before_gate else wide * gate
    normed = (u.unflatten(-1, (-1, group_size)) * _rstd(u, group_size, eps)).flatten(-2) * weight
    return (normed * gate if norm_before_gate and gate is not None else normed).to(x.dtype).contiguous()


def backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of x, z and weight. With n = u / rms(u): du = (dn - n <n, dn> / size) / rms(u)."""
    wide, wide_z, dy = _wide(x), None if z is None else _wide(z), _wide(dy)
    sigmoid = None if z is None else torch.sigmoid(wide_z)
    gate = 1 if z is None else wide_z * sigmoid
    u = wide if norm_before_gate else wide * gate
    rstd = _rstd(u, group_size, eps)
    n = (u.unflatten(-1, (-1, group_size)) * rstd).flatten(-2)
    dnormed = dy * gate if norm_before_gate else dy
    dweight = (dnormed * n).flatten(0, -2).sum(0).to(weight.dtype)

    groups, dn = n.unflatten(-1, (-1, group_size)), (dnormed * weight).unflatten(-1, (-1, group_size))
    du = ((dn - groups * (groups * dn).mean(-1, keepdim=True)) * rstd).flatten(-2)
    dx = du if norm_before_gate else du * gate
    if z is None:
        return dx.to(x.dtype), None, dweight
    dgate = dy * n * weight if norm_before_gate else du * wide
    dz = dgate * sigmoid * (1 + wide_z * (1 - sigmoid))
    return dx.to(x.dtype), dz.to(z.dtype), dweight


def _rstd(u: Tensor, group_size: int, eps: float) -> Tensor:
    """1 / rms of each group: [..., groups, 1]."""
    return torch.rsqrt(u.unflatten(-1, (-1, group_size)).square().mean(-1, keepdim=True) + eps)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
