"""gated_rms_norm forward and backward, one pass over memory each.

A program holds one group of one row at a time: forward moves x, z and y once; backward x, z, dy, dx and dz once and forms the
mean square again, which costs less than reading it. dweight: each program sums the rows it passes, in order, into a row of
its own, and torch adds these rows: the same bits on every run.
"""

import torch
from torch import Tensor

from nvfp4_kernels.ops import _device
from nvfp4_kernels.ops._triton import jit, launch, next_power_of_2, refuses_device, tl

LARGEST = 65536  # channels of a group that fit one program's registers


def refuses(x, z, weight, eps, group_size, norm_before_gate) -> str | None:
    if x.dtype == torch.float64:
        return "float64"
    return f"group_size {group_size} above {LARGEST}" if group_size > LARGEST else refuses_device(x)


def warps(block: int) -> int:
    """At least 8 values a lane, so that loads are 16 bytes wide, and at most 16 warps."""
    return max(1, min(16, block // 256))


@jit
def forward_kernel(
    x_ptr, z_ptr, weight_ptr, y_ptr, x_stride, z_stride, channels, group_size, eps,
    BLOCK: tl.constexpr, GATED: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    col = tl.arange(0, BLOCK)
    inside = col < group_size
    at = group * group_size + col
    u = tl.load(x_ptr + row * x_stride + at, inside, 0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, inside, 0.0).to(tl.float32)
    gate = 1.0
    if GATED:
        z = tl.load(z_ptr + row * z_stride + at, inside, 0.0).to(tl.float32)
        gate = z * tl.sigmoid(z)
        if not GATE_LAST:
            u = u * gate
    rstd = tl.rsqrt(tl.sum(u * u, 0) / group_size + eps)
    y = u * rstd * weight
    if GATE_LAST:
        y = y * gate
    tl.store(y_ptr + row * channels + at, y.to(y_ptr.dtype.element_ty), inside)


@jit
def backward_kernel(
    dy_ptr, x_ptr, z_ptr, weight_ptr, dx_ptr, dz_ptr, dweight_ptr, dy_stride, x_stride, z_stride, rows, channels,
    group_size, eps,
    BLOCK: tl.constexpr, GATED: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    col = tl.arange(0, BLOCK)
    inside = col < group_size
    at = group * group_size + col
    weight = tl.load(weight_ptr + at, inside, 0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(row, tl.int64)
        x = tl.load(x_ptr + row * x_stride + at, inside, 0.0).to(tl.float32)
        dn = tl.load(dy_ptr + row * dy_stride + at, inside, 0.0).to(tl.float32)
        u = x
        if GATED:
            z = tl.load(z_ptr + row * z_stride + at, inside, 0.0).to(tl.float32)
            sigmoid = tl.sigmoid(z)
            gate = z * sigmoid
            slope = sigmoid * (1.0 + z * (1.0 - sigmoid))
            if GATE_LAST:
                dy = dn
                dn = dn * gate
            else:
                u = x * gate
        rstd = tl.rsqrt(tl.sum(u * u, 0) / group_size + eps)
        n = u * rstd
        dweight += dn * n
        dn = dn * weight
        du = (dn - n * (tl.sum(n * dn, 0) / group_size)) * rstd
        dx = du
        if GATED:
            if GATE_LAST:
                dz = dy * n * weight * slope
            else:
                dz = du * x * slope
                dx = du * gate
            tl.store(dz_ptr + row * channels + at, dz.to(dz_ptr.dtype.element_ty), inside)
        tl.store(dx_ptr + row * channels + at, dx.to(dx_ptr.dtype.element_ty), inside)
    tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * channels + at, dweight, inside)


def run(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    channels, block = x.shape[-1], next_power_of_2(group_size)
    gated, x = z is not None, _rows(x)
    z = _rows(z) if gated else x
    launch(
        forward_kernel,
        (x.shape[0], channels // group_size),
        *(x, z, weight, y, x.stride(0), z.stride(0), channels, group_size, eps),
        **dict(BLOCK=block, GATED=gated, GATE_LAST=gated and norm_before_gate),
        num_warps=warps(block),
    )
    return y


def backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dz = None if z is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    channels, block = x.shape[-1], next_power_of_2(group_size)
    gated, x, dy = z is not None, _rows(x), _rows(dy)
    z = _rows(z) if gated else x
    # 4 programs an SM over all groups hide the latency of one row's reductions behind another's
    programs = max(1, min(x.shape[0], 4 * _device.multiprocessors(x.device) * group_size // channels))
    partial = torch.empty(programs, channels, dtype=torch.float32, device=x.device)
    launch(
        backward_kernel,
        (programs, channels // group_size),
        *(dy, x, z, weight, dx, dz if gated else dx, partial, dy.stride(0), x.stride(0), z.stride(0)),
        *(x.shape[0], channels, group_size, eps),
        **dict(BLOCK=block, GATED=gated, GATE_LAST=gated and norm_before_gate),
        num_warps=warps(block),
    )
    return dx, dz, partial.sum(0).to(weight.dtype)


def _rows(x: Tensor) -> Tensor:
    """x as [rows, channels] with contiguous channels, without a copy where its strides allow it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()
