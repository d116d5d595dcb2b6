"""moe_step through csrc/moe_step: one call from Python for all kernels of the block."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import is_packed
from nvfp4_kernels.ops._native import DTYPES, check, empty, native, refuses_float
from nvfp4_kernels.ops.grouped_matmul.native import operand, readable


def refuses(x: Tensor, router: Tensor, bias: Tensor | None, matrices: tuple, choice: tuple) -> str | None:
    if any(m is not None and is_packed(m) for m in matrices):
        return "the CPU kernels read no packed stacks"
    return refuses_float(x)


def run(x: Tensor, router: Tensor, bias: Tensor | None, matrices: tuple, choice: tuple) -> Tensor:
    return call(x, operands(router, bias, matrices), choice)


def operands(router: Tensor, bias: Tensor | None, matrices: tuple) -> tuple:
    """The block as csrc/bindings_steps.cpp takes it, and what must live as long: copies made for that."""
    router, bias = router.float().contiguous(), None if bias is None else bias.float().contiguous()
    stacks = [None if m is None else readable(m) for m in matrices]
    copies = router, bias, [s for s, given in zip(stacks, matrices, strict=True) if s is not given]
    (up, up_stride), (down, down_stride), *others = [((), 0) if m is None else operand(m) for m in stacks]
    places = router.data_ptr(), 0 if bias is None else bias.data_ptr(), len(router)
    return (places, (up, up_stride, down, down_stride), tuple(other[0] for other in others)), copies


def call(x: Tensor, block: tuple, choice: tuple) -> Tensor:
    """block: as `operands` gives it. choice: (top_k, scale, n_group, topk_group, normalize)."""
    x = x if x.stride(1) == 1 else x.contiguous()
    top_k, scale, *groups, normalize = choice
    y = empty(x.shape, dtype=x.dtype)
    status = native.moe_step(
        (DTYPES[x.dtype], x.data_ptr(), 0, 0, *x.shape, *x.stride()),
        *block[0],
        (top_k, *groups),
        scale,
        normalize,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    check(status)
    return y
