"""state_update through csrc/state_update: states and inputs are used where they lie, if their last axis is contiguous."""

import torch
from torch import Tensor

from nvfp4_kernels.ops import _cuda
from nvfp4_kernels.ops._native import DTYPES, check, empty, native, refuses_device
from nvfp4_kernels.ops.state_update import _cuda as cuda

NONE = (0, 0, 0, 0, 0)  # the view of a tensor that was not given


def refuses(state, x, dt, A, B, C, D, z, dt_bias, indices, intermediate, *options) -> str | None:
    for name, t in (("state", state), ("x", x), ("dt", dt), ("B", B), ("C", C), ("z", z)):
        if t is not None and t.dtype not in DTYPES:
            return f"bf16, fp16 and fp32 only, {name} is {t.dtype}"
    for name, t in (("state", state), ("intermediate", intermediate)):
        if t is not None and t.shape[-1] > 1 and t.stride(-1) != 1:
            return f"the last axis of {name} is not contiguous"
    if 0 in (x.shape[2], B.shape[2]):
        return "no heads or groups"
    return cuda.refuses(state, x) if _cuda.takes(x) else refuses_device(x)


def run(state, x, dt, A, B, C, D, z, dt_bias, indices, intermediate, noise, dt_softplus, low, high) -> Tensor:
    (batch, tokens, heads, head_dim), groups = x.shape, B.shape[2]
    x, B, C, z = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (x, B, C, z))
    A, D, dt_bias = (None if t is None else t.to(torch.float32).contiguous() for t in (A, D, dt_bias))
    indices, noise = (None if t is None else t.to(torch.int64).contiguous() for t in (indices, noise))
    if _cuda.takes(x):
        return cuda.run(state, x, dt, A, B, C, D, z, dt_bias, indices, intermediate, noise, dt_softplus, low, high)
    y = empty(x.shape, dtype=x.dtype)
    status = native.state_update(
        (batch, tokens, heads, groups, head_dim, B.shape[3], state.shape[0], DTYPES[state.dtype]),
        (state.data_ptr(), state.stride(0), 0, *state.stride()[1:3]),
        NONE if intermediate is None else (intermediate.data_ptr(), *intermediate.stride()[:4]),
        (*map(_view, (x, dt, B, C, z)), _address(A), _address(D), D is not None and D.dim() == 2, _address(dt_bias)),
        _address(indices),
        (dt_softplus, low, high),
        _address(noise),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if status == 2:
        raise ValueError(
            f"indices: got a slot beyond the {state.shape[0]} of state; allowed: -1 to {state.shape[0] - 1}"
        )
    check(status)
    return y


def _view(t: Tensor | None) -> tuple[int, ...]:
    """What csrc/bindings.cpp calls a view."""
    return NONE if t is None else (t.data_ptr(), DTYPES[t.dtype], *t.stride()[:3])


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
