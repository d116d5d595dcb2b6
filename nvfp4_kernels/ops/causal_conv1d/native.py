"""Forward and backward through csrc/causal_conv1d: x and dy are read where they lie, if their channels lie side by side."""

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import boundaries
from nvfp4_kernels.ops._native import DTYPES, check, empty, native, refuses_float


def refuses(x: Tensor, *rest) -> str | None:
    return refuses_float(x)


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    kept, inputs = _inputs(x, weight, bias, initial_state, cu_seqlens, silu)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = empty(x.shape, dtype=x.dtype)
    state = empty(sequences, x.shape[2], weight.shape[1] - 1, dtype=x.dtype)
    _check(native.causal_conv1d(*inputs, y.data_ptr(), state.data_ptr(), torch.get_num_threads()), x, cu_seqlens)
    return y, state


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
    kept, inputs = _inputs(x, weight, bias, initial_state, cu_seqlens, silu)
    dy, dstate = _rows(dy, cu_seqlens), None if dstate is None else dstate.contiguous()
    dx = empty(x.shape, dtype=x.dtype)
    dtaps = empty(weight.shape[1] + 1, x.shape[2], dtype=torch.float32)
    dinitial = None if initial_state is None else empty(initial_state.shape, dtype=torch.float32)
    status = native.causal_conv1d_backward(
        *inputs,
        (dy.data_ptr(), *dy.stride()[:2]),
        _pointer(dstate),
        dx.data_ptr(),
        dtaps.data_ptr(),
        _pointer(dinitial),
        torch.get_num_threads(),
    )
    _check(status, x, cu_seqlens)
    dbias = None if bias is None else dtaps[-1].to(bias.dtype)
    return dx, dtaps[:-1].t().to(weight.dtype), dbias, None if dinitial is None else dinitial.to(initial_state.dtype)


def _inputs(x, weight, bias, initial_state, cu_seqlens, silu):
    """The tensors behind the pointers, to be kept alive, and the arguments that both directions share."""
    (batch, length, channels), width = x.shape, weight.shape[1]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = _rows(x, cu_seqlens)
    taps, bias = weight.float().t().contiguous(), None if bias is None else bias.float().contiguous()
    starts = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    if initial_state is not None:
        initial_state = (initial_state if initial_state.dtype in DTYPES else initial_state.float()).contiguous()
    arguments = (
        (DTYPES[x.dtype], batch * length, channels, sequences, width, silu),
        _pointer(starts),
        (rows.data_ptr(), *rows.stride()[:2]),
        taps.data_ptr(),
        _pointer(bias),
        (0, 0) if initial_state is None else (initial_state.data_ptr(), DTYPES[initial_state.dtype]),
    )
    return (rows, taps, bias, starts, initial_state), arguments


def _rows(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[row, token, channel]; packed sequences run over the rows and need all tokens in one. A copy only where there must be."""
    if cu_seqlens is not None:
        x = x.reshape(1, x.shape[0] * x.shape[1], x.shape[2])
    return x if x.stride(2) == 1 else x.contiguous()


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _check(status: int, x: Tensor, cu_seqlens: Tensor | None) -> None:
    if status == 2:
        boundaries(cu_seqlens, x.shape[0] * x.shape[1])
    check(status)
