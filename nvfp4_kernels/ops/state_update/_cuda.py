"""state_update through csrc/state_update/cuda.cu: which kernel, with which parameters."""

import struct

import torch
from torch import Tensor

from nvfp4_kernels.ops import _cuda
from nvfp4_kernels.ops._cuda import address
from nvfp4_kernels.ops._native import DTYPES

THREADS = 128  # csrc/state_update/cuda.cu
SIZES = (64, 128, 256)
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

INPUT = struct.Struct("Qqqqq")  # csrc/state_update/launch.h
LAUNCH = struct.Struct("QqqqQqqqq200sQQQQQQqqqqqqiiiiff")
NONE = INPUT.pack(0, 0, 0, 0, 0)


def refuses(state: Tensor, x: Tensor) -> str | None:
    if state.shape[-1] > SIZES[-1]:
        return f"state of {state.shape[-1]} above {SIZES[-1]}"
    return _cuda.refuses_device("state_update", x)


def kernel(dtype: torch.dtype, size: int, noisy: bool) -> tuple[str, int, int]:
    """Its name, the size that it has room for, and how many of a head's channels a block takes."""
    room = next(most for most in SIZES if size <= most)
    return f"state_update_{'noisy_' if noisy else ''}{NAMES[dtype]}_{room}", room, 16 if noisy or room == 256 else 32


def run(state, x, dt, A, B, C, D, z, dt_bias, indices, intermediate, noise, dt_softplus, low, high) -> Tensor:
    """As native.run, whose preparations have been made: contiguous last axes, fp32 A, D, dt_bias, int64 indices and noise."""
    (batch, tokens, heads, head_dim), size = x.shape, B.shape[3]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    name, room, channels = kernel(state.dtype, size, noise is not None)
    blocks = -(-head_dim // channels)
    written = (state,) if intermediate is None else (state, intermediate)
    wide = size * state.element_size() % 16 == 0 and all(
        t.data_ptr() % 16 == 0 and all(n * t.element_size() % 16 == 0 for n in t.stride()[:-1]) for t in written
    )
    parameters = LAUNCH.pack(
        *(state.data_ptr(), *state.stride()[:3]),
        *((0, 0, 0, 0, 0) if intermediate is None else (intermediate.data_ptr(), *intermediate.stride()[:4])),
        b"".join(
            NONE if t is None else INPUT.pack(t.data_ptr(), DTYPES[t.dtype], *t.stride()[:3]) for t in (x, dt, B, C, z)
        ),
        *(address(t) for t in (A, D, dt_bias, indices, noise, y)),
        *(tokens, heads, B.shape[2], head_dim, size, state.shape[0]),
        *(D is not None and D.dim() == 2, dt_softplus, wide, blocks, low, high),
    )
    if x.numel():
        _cuda.launch("state_update", name, (batch * heads * blocks,), THREADS, 4 * room * 4, parameters, x)
    return y
