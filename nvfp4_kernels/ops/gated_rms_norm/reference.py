"""u = x silu(z); y = w u / rms(u) by groups. Only x, z and the inverse rms are kept for backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2**18  # elements done at a time


def refuses(x, z, weight, eps, group_size, norm_before_gate) -> str | None:
    return None


def run(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool) -> Tensor:
    if norm_before_gate and z is not None:
        normed = _Norm.apply(_wide(x), None, weight, eps, group_size)
        return (normed * F.silu(_wide(z))).to(x.dtype)
    return _Norm.apply(x, z, weight, eps, group_size)


class _Norm(torch.autograd.Function):
    """Written out, since autograd would keep six fp32 copies of x; a few rows at a time, which stay in the cache."""

    @staticmethod
    def forward(ctx, x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int) -> Tensor:
        y, rstd = torch.empty_like(x, memory_format=torch.contiguous_format), []
        out = y.view(-1, x.shape[-1])
        for rows, (u, gate) in _blocks(x, z):
            u = u if gate is None else F.silu(gate, inplace=True).mul_(u)
            groups = u.unflatten(-1, (-1, group_size))
            rstd.append(torch.linalg.vecdot(groups, groups).div_(group_size).add_(eps).rsqrt_().unsqueeze_(-1))
            out[rows] = (groups * rstd[-1]).flatten(-2).mul_(weight)
        ctx.save_for_backward(x, z, weight, torch.cat(rstd))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        x, z, weight, rstd = ctx.saved_tensors
        dx, dz = (t if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, z))
        dx_rows, dz_rows = (t if t is None else t.view(-1, x.shape[-1]) for t in (dx, dz))
        dweight = torch.zeros_like(weight)
        for rows, (u, dn, gate) in _blocks(x, dy, z):
            if gate is not None:
                sigmoid = torch.sigmoid(gate)
                wide_x, gate = u, gate.mul_(sigmoid)
                u = u * gate
            n = u.unflatten(-1, (rstd.shape[1], -1)).mul(rstd[rows])
            dweight += (n.flatten(-2) * dn).sum(0)
            dn = dn.mul_(weight).view_as(n)
            shared = torch.linalg.vecdot(n, dn).unsqueeze_(-1).div_(-n.shape[-1])
            du = dn.addcmul_(n, shared).mul_(rstd[rows]).flatten(-2)  # rstd (dn - n <n, dn> / size)
            if gate is None:
                dx_rows[rows] = du
                continue
            # silu'(z) = sigmoid (1 + z (1 - sigmoid)) = sigmoid + gate - gate sigmoid
            slope = torch.addcmul(gate, gate, sigmoid, value=-1).add_(sigmoid)
            dz_rows[rows] = slope.mul_(du).mul_(wide_x)
            dx_rows[rows] = gate.mul_(du)
        return dx, dz, dweight, None, None


def _blocks(*tensors: Tensor | None):
    """(rows, the tensors' rows in fp32 or fp64, as copies) a few at a time; None stays None."""
    flat = [None if t is None else t.reshape(-1, t.shape[-1]) for t in tensors]
    wide = torch.float64 if flat[0].dtype == torch.float64 else torch.float32
    step = max(1, BLOCK // max(flat[0].shape[1], 1))
    for start in range(0, max(flat[0].shape[0], 1), step):
        rows = slice(start, start + step)
        yield rows, [None if t is None else t[rows].to(wide, copy=True) for t in flat]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
