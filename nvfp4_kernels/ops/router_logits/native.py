"""Forward and backward through csrc/router_logits, x's rows at any distance."""

import torch
from torch import Tensor

from nvfp4_kernels.ops._native import DTYPES, check, empty, native, refuses_float


def refuses(x: Tensor, weight: Tensor) -> str | None:
    return refuses_float(x)


def run(x: Tensor, weight: Tensor) -> Tensor:
    kept, given = _given(x, weight)
    logits = empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    check(native.router_logits(*given, logits.data_ptr(), torch.get_num_threads()))
    return logits


def backward(dlogits: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight."""
    kept, given = _given(x, weight)
    dlogits = dlogits.contiguous()
    dx, dweight = empty(x.shape, dtype=x.dtype), empty(weight.shape, dtype=torch.float32)
    places = dlogits.data_ptr(), dx.data_ptr(), dweight.data_ptr()
    check(native.router_logits_backward(*given, *places, torch.get_num_threads()))
    return dx, dweight.to(weight.dtype)


def _given(x: Tensor, weight: Tensor):
    """The tensors behind the pointers, to be kept alive, and the arguments that both directions share."""
    x, weight = x if x.stride(1) == 1 else x.contiguous(), weight.float().contiguous()
    return (x, weight), ((x.data_ptr(), DTYPES[x.dtype], x.stride(0)), weight.data_ptr(), (*x.shape, weight.shape[0]))
