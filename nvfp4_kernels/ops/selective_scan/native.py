"""selective_scan through csrc/selective_scan."""

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import boundaries
from nvfp4_kernels.ops._native import DTYPES, check, empty, native, refuses_device


def refuses(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, *options) -> str | None:
    narrow = {"x": x, "dt": dt, "B": B, "C": C}
    wide = [f"{name} is {t.dtype}" for name, t in narrow.items() if t.dtype not in DTYPES]
    if wide:
        return f"bf16, fp16 and fp32 only, {wide[0]}"
    if 0 in (*x.shape[2:], *B.shape[2:]):
        return "no heads, groups, channels or states"
    return refuses_device(x)


def run(
    x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, low, high, chunk_size
) -> tuple[Tensor, Tensor]:
    given, held = _given(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, low, high, chunk_size)
    y = x.new_empty(x.shape)
    last = x.new_empty(given[2], *x.shape[2:], B.shape[3], dtype=torch.float32)
    check(native.selective_scan(*given, y.data_ptr(), last.data_ptr(), torch.get_num_threads()))
    return y, last


def backward(
    dy, dstate, x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, low, high, chunk_size
) -> tuple[Tensor | None, ...]:
    """The gradients of x, dt, A, B, C, D, dt_bias and initial_state; None for those not given."""
    given, held = _given(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, low, high, chunk_size)
    dy, dstate = _rows(dy.to(x.dtype), cu_seqlens), _floats(dstate)
    heads, head_dim = x.shape[2:]
    narrow = [empty(t.shape, dtype=t.dtype) for t in (x, dt, B, C)]
    dA, dbias = empty(heads, dtype=torch.float32), empty(heads, dtype=torch.float32)
    dD = None if D is None else empty(heads, head_dim, dtype=torch.float32)
    dinitial = None if initial_state is None else empty(initial_state.shape, dtype=torch.float32)
    made = [_address(t) for t in (*narrow, dA, dD, dbias, dinitial)]
    check(native.selective_scan_backward(*given, _view(dy), _address(dstate), tuple(made), torch.get_num_threads()))
    dx, ddt, dB, dC = narrow
    if D is not None:
        dD = (dD if D.dim() == 2 else dD.sum(1)).to(D.dtype)
    dbias = None if dt_bias is None else dbias.to(dt_bias.dtype)
    return dx, ddt, dA.to(A.dtype), dB, dC, dD, dbias, None if dinitial is None else dinitial.to(initial_state.dtype)


def _given(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, low, high, chunk_size) -> tuple:
    """The first arguments of both calls, and the tensors behind their pointers."""
    batch, length, heads, head_dim = x.shape
    sequences = _sequences(cu_seqlens, batch, length)
    views = [_rows(t, cu_seqlens) for t in (x, dt[..., None], B, C)]
    D = D if D is None or D.dim() == 2 else D[:, None].expand(heads, head_dim)
    floats = [_floats(t) for t in (A, D, dt_bias, initial_state)]
    rows, length = views[0].shape[:2]
    sizes = (rows, length, heads, B.shape[2], head_dim, B.shape[3])
    inputs = (*map(_view, views), *map(_address, floats))
    given = (inputs, sequences.data_ptr(), len(sequences), sizes, (dt_softplus, low, high, chunk_size))
    return given, (views, floats, sequences)


def _sequences(cu_seqlens: Tensor | None, batch: int, length: int) -> Tensor:
    """int64 [sequences, 4]: row, first token in it, tokens, place; the longest come first."""
    if cu_seqlens is None:
        found = [(row, 0, length, row) for row in range(batch)]
        return torch.tensor(found, dtype=torch.int64, device="cpu").view(-1, 4)
    bounds = boundaries(cu_seqlens, batch * length)
    found = [(0, start, end - start, i) for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False))]
    return torch.tensor(sorted(found, key=lambda s: -s[2]), dtype=torch.int64, device="cpu")


def _rows(t: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """t with its last axis contiguous; all tokens as one row where sequences are packed."""
    t = t if cu_seqlens is None else t.reshape(1, -1, *t.shape[2:])
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _view(t: Tensor) -> tuple:
    """What csrc/bindings.cpp calls a view."""
    return t.data_ptr(), DTYPES[t.dtype], *t.stride()[:3]


def _floats(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.float32).contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
