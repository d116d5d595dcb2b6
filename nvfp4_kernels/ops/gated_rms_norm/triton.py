"""gated_rms_norm forward and backward, one pass over memory each.

A program holds one group of one row at a time: forward moves x, z and y once; backward x, z, dy, dx and dz once and forms the
mean square again, which costs less than reading it. A group above PIECE goes through the registers in pieces, twice, the
second time out of the cache. dweight: each program sums the rows it passes, in order, into a row of its own, and torch adds
these rows: the same bits on every run.
"""

import torch
from torch import Tensor

from nvfp4_kernels.ops import _device
from nvfp4_kernels.ops._triton import as_rows, jit, launch, next_power_of_2, refuses_device, tl
from nvfp4_kernels.ops._triton_logistic import logistic

PIECE = 4096  # channels: 8 a lane at 16 warps. 8192 spill in backward
LARGEST = 8 * PIECE  # the pieces are unrolled; 16 spill


def refuses(x, z, weight, eps, group_size, norm_before_gate) -> str | None:
    if x.dtype == torch.float64:
        return "float64"
    return f"group_size {group_size} above {LARGEST}" if group_size > LARGEST else refuses_device(x)


def tile(group_size: int) -> dict:
    """At least 8 values a lane, so that 16-bit loads are 16 bytes wide, and at most 16 warps."""
    block = min(next_power_of_2(group_size), PIECE)
    return dict(BLOCK=block, PIECES=-(-group_size // block), num_warps=max(1, min(16, block // 256)))


def backward_programs(rows: int, groups: int, warps: int, device: torch.device) -> int:
    """Programs for each group: 16 warps an SM, as many as its registers hold at 128 a lane; rows hide each other's waits."""
    return max(1, min(rows, _device.multiprocessors(device) * 16 // (warps * groups)))


@jit
def load(ptr, col, group_size):
    return tl.load(ptr + col, col < group_size, 0.0).to(tl.float32)


@jit
def load_gated(x_ptr, z_ptr, col, group_size, GATED: tl.constexpr):
    """x, its gate z * logistic(z) and the gate's derivative."""
    x = load(x_ptr, col, group_size)
    gate, slope = 1.0, 0.0
    if GATED:
        z = load(z_ptr, col, group_size)
        sigmoid = logistic(z)
        gate = z * sigmoid
        slope = sigmoid * (1.0 + z * (1.0 - sigmoid))
    return x, gate, slope


@jit
def forward_kernel(
    x_ptr, z_ptr, weight_ptr, y_ptr, x_stride, z_stride, channels, group_size, eps,
    BLOCK: tl.constexpr, PIECES: tl.constexpr, GATED: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * group_size
    x_ptr += row * x_stride + first
    z_ptr += row * z_stride + first
    y_ptr += row * channels + first
    col, square = tl.arange(0, BLOCK), 0.0
    for piece in tl.static_range(PIECES):
        x, gate, _ = load_gated(x_ptr, z_ptr, piece * BLOCK + col, group_size, GATED)
        u = x if GATE_LAST else x * gate
        square += tl.sum(u * u, 0)
    rstd = tl.rsqrt(square / group_size + eps)
    for piece in tl.static_range(PIECES):
        at = piece * BLOCK + col
        if PIECES > 1:
            x, gate, _ = load_gated(x_ptr, z_ptr, at, group_size, GATED)
        y = x * gate * rstd * load(weight_ptr + first, at, group_size)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), at < group_size)


@jit(do_not_specialize=["rows"])  # one compiled kernel for all batches
def backward_kernel(
    dy_ptr, x_ptr, z_ptr, weight_ptr, dx_ptr, dz_ptr, dweight_ptr, dy_stride, x_stride, z_stride, rows, channels,
    group_size, eps,
    BLOCK: tl.constexpr, PIECES: tl.constexpr, GATED: tl.constexpr, GATE_LAST: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * group_size
    weight_ptr += first
    dweight_ptr += tl.program_id(0).to(tl.int64) * channels + first
    col = tl.arange(0, BLOCK)
    weight = load(weight_ptr, col, group_size)
    dweight = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        offset = tl.cast(row, tl.int64)
        x_row, z_row = x_ptr + offset * x_stride + first, z_ptr + offset * z_stride + first
        dy_row, out = dy_ptr + offset * dy_stride + first, offset * channels + first
        square, product = 0.0, 0.0
        for piece in tl.static_range(PIECES):
            at = piece * BLOCK + col
            x, gate, slope = load_gated(x_row, z_row, at, group_size, GATED)
            dy = load(dy_row, at, group_size)
            if PIECES > 1:
                weight = load(weight_ptr, at, group_size)
            u = x if GATE_LAST else x * gate
            dn = dy * gate if GATE_LAST else dy
            square += tl.sum(u * u, 0)
            product += tl.sum(u * dn * weight, 0)
        rstd = tl.rsqrt(square / group_size + eps)
        mean = product * rstd / group_size  # of the normed values times their gradients
        for piece in tl.static_range(PIECES):
            at = piece * BLOCK + col
            inside = at < group_size
            if PIECES > 1:
                x, gate, slope = load_gated(x_row, z_row, at, group_size, GATED)
                dy = load(dy_row, at, group_size)
                weight = load(weight_ptr, at, group_size)
            n = (x if GATE_LAST else x * gate) * rstd
            dn = dy * gate if GATE_LAST else dy
            if PIECES > 1:
                before = tl.load(dweight_ptr + at, inside, 0.0)  # zeros in front of the first row
                tl.store(dweight_ptr + at, before + dn * n, inside)
            else:
                dweight += dn * n
            du = (dn * weight - n * mean) * rstd
            if GATED:
                dz = (dy * n * weight if GATE_LAST else du * x) * slope
                tl.store(dz_ptr + out + at, dz.to(dz_ptr.dtype.element_ty), inside)
            dx = du if GATE_LAST else du * gate
            tl.store(dx_ptr + out + at, dx.to(dx_ptr.dtype.element_ty), inside)
    if PIECES == 1:
        tl.store(dweight_ptr + col, dweight, col < group_size)


def run(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    channels, gated, x = x.shape[-1], z is not None, as_rows(x)
    z = as_rows(z) if gated else x
    launch(
        forward_kernel,
        (x.shape[0], channels // group_size),
        *(x, z, weight.contiguous(), y, x.stride(0), z.stride(0), channels, group_size, eps),
        **dict(GATED=gated, GATE_LAST=gated and norm_before_gate),
        **tile(group_size),
    )
    return y


def backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dz = None if z is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    channels, gated, x, dy = x.shape[-1], z is not None, as_rows(x), as_rows(dy)
    z = as_rows(z) if gated else x
    form = tile(group_size)
    groups = channels // group_size
    programs = backward_programs(x.shape[0], groups, form["num_warps"], x.device)
    partial = torch.zeros(programs, channels, dtype=torch.float32, device=x.device)
    launch(
        backward_kernel,
        (programs, groups),
        *(dy, x, z, weight.contiguous(), dx, dz if gated else dx, partial, dy.stride(0), x.stride(0), z.stride(0)),
        *(x.shape[0], channels, group_size, eps),
        **dict(GATED=gated, GATE_LAST=gated and norm_before_gate),
        **form,
    )
    return dx, dz, partial.sum(0).to(weight.dtype)
