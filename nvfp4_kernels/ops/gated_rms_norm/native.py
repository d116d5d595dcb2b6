"""Forward and backward through csrc/gated_rms_norm: x, z and dy are read where they lie, if their rows are contiguous."""

import torch
from torch import Tensor

from nvfp4_kernels.ops._native import DTYPES, check, empty, native, refuses_float


def refuses(x: Tensor, z: Tensor | None, weight: Tensor, *options) -> str | None:
    return refuses_float(x)


def run(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool) -> Tensor:
    rows, gate, wide_weight = _rows(x), _rows(z), weight.float().contiguous()
    y = empty(x.shape, dtype=x.dtype)
    status = native.gated_rms_norm(
        DTYPES[x.dtype],
        *rows.shape,
        group_size,
        eps,
        norm_before_gate,
        _place(rows),
        _place(gate),
        wide_weight.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    check(status)
    return y


def backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of x, z and weight."""
    rows, gate, dy_rows, wide_weight = _rows(x), _rows(z), _rows(dy), weight.float().contiguous()
    dx, dz = empty(x.shape, dtype=x.dtype), None if z is None else empty(z.shape, dtype=z.dtype)
    dweight = empty(weight.shape, dtype=torch.float32)
    status = native.gated_rms_norm_backward(
        DTYPES[x.dtype],
        *rows.shape,
        group_size,
        eps,
        norm_before_gate,
        _place(rows),
        _place(gate),
        wide_weight.data_ptr(),
        _place(dy_rows),
        dx.data_ptr(),
        0 if dz is None else dz.data_ptr(),
        dweight.data_ptr(),
        torch.get_num_threads(),
    )
    check(status)
    return dx, dz, dweight.to(weight.dtype)


def _rows(t: Tensor | None) -> Tensor | None:
    """[rows, channels], a copy only where strides allow no such view or the channels do not lie side by side."""
    if t is None:
        return None
    rows = t.reshape(-1, t.shape[-1]) if t.shape[-1] else t.new_empty(0, 0)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _place(rows: Tensor | None) -> tuple[int, int]:
    return (0, 0) if rows is None else (rows.data_ptr(), rows.stride(0))
