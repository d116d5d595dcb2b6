"""u = x silu(z); y = w u / rms(u) by groups. Only x, z and the inverse rms are kept for backward."""

import torch
import torch.nn.functional as F
from torch import Tensor


def refuses(x, z, weight, eps, group_size, norm_before_gate) -> str | None:
    return None


def run(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool) -> Tensor:
    if norm_before_gate and z is not None:
        normed = _Norm.apply(_wide(x), None, weight, eps, group_size)
        return (normed * F.silu(_wide(z))).to(x.dtype)
    return _Norm.apply(x, z, weight, eps, group_size)


class _Norm(torch.autograd.Function):
    """Written out, since autograd would keep six fp32 copies of x: the op is bound by memory traffic alone."""

    @staticmethod
    def forward(ctx, x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int) -> Tensor:
        u = _wide(x) if z is None else F.silu(_wide(z)).mul_(x)
        groups = u.unflatten(-1, (-1, group_size))
        rstd = torch.linalg.vecdot(groups, groups).div_(group_size).add_(eps).rsqrt_().unsqueeze_(-1)
        ctx.save_for_backward(x, z, weight, rstd)
        return (groups * rstd).flatten(-2).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        x, z, weight, rstd = ctx.saved_tensors
        shape = (rstd.shape[-2], -1)
        if z is not None:
            wide_z = _wide(z)
            sigmoid = torch.sigmoid(wide_z)
            gate = wide_z * sigmoid
        n = (_wide(x) if z is None else gate * x).unflatten(-1, shape) * rstd
        dn = (dy * weight).unflatten(-1, shape)
        dweight = (n.flatten(-2) * dy).flatten(0, -2).sum(0).to(weight.dtype)
        shared = torch.linalg.vecdot(n, dn).unsqueeze_(-1).div_(-n.shape[-1])
        du = dn.addcmul_(n, shared).mul_(rstd).flatten(-2)  # rstd (dn - n <n, dn> / size)
        if z is None:
            return du.to(x.dtype), None, dweight, None, None
        # silu'(z) = sigmoid (1 + z (1 - sigmoid)) = sigmoid + gate - gate sigmoid
        slope = torch.addcmul(gate, gate, sigmoid, value=-1).add_(sigmoid)
        dz = slope.mul_(du).mul_(x).to(z.dtype)
        return gate.mul_(du).to(x.dtype), dz, dweight, None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
