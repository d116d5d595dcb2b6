"""grouped_matmul: one matmul for each group of rows that lie together, as the tokens of each expert do, in one call."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops._check import FLOATS, float_tensor, no_grad, require, same_device
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._library import register


def grouped_matmul(a: Tensor, b: Tensor | Stack, offsets: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """y = a @ b.T for each group by itself, summed in fp32, rounded once; group e has the rows offsets[e] to offsets[e + 1].

    a: bf16, fp16 or fp32 (or fp64, then b and y too), any strides. out_dtype: a's by default.
    offsets: int64 [groups + 1], ascending from 0, on a's device; nothing of it is read back to the host.
    b a stack [groups, N, K], plain or NVFP4: a is [rows, K], its rows in the order of the groups; y is [rows, N].
    b a plain matrix [N, rows]: a is [M, rows], and the sum is divided; y is [groups, M, N], zero for a group without rows.

    For a layer y = x w^T of each expert: forward grouped_matmul(x, w, o), the gradient of x
    grouped_matmul(dy, w.transpose(1, 2), o), that of w grouped_matmul(dy.t(), x.t(), o).
    Raises TypeError, ValueError or RuntimeError naming the argument.
    """
    stack = b if isinstance(b, Stack) else Stack(b)
    _check_values("a", a)
    require(a.dim() == 2, "a", f"{a.dim()} dimensions", "2, [rows, K], or [M, rows] where b has 2")
    _check_offsets(offsets, a.device)
    check_stack("b", stack, a.device)
    out_dtype = out_dtype or a.dtype
    require(out_dtype in (*FLOATS, torch.float64), "out_dtype", out_dtype, "a floating-point type", TypeError)
    types = {a.dtype, out_dtype} | ({stack.values.dtype} if stack.scales is None else set())
    mixed = torch.float64 in types and len(types) > 1
    require(not mixed, "a, b and out_dtype", ", ".join(sorted(map(str, types))), "float64 for all or none", TypeError)
    groups = offsets.numel() - 1
    if stack.values.dim() == 3:
        require(stack.values.shape[0] == groups, "offsets", f"{groups + 1} numbers", f"{len(stack.values) + 1}")
        k = stack.values.shape[2] * (1 if stack.scales is None else 2)
    else:
        require(stack.scales is None, "b", "2 dimensions of NVFP4", "a plain matrix, or an NVFP4 stack [groups, N, K]")
        k = stack.values.shape[1]
    require(a.shape[1] == k, "a and b", f"K = {a.shape[1]} and K = {k}", "equal K, the last axis of both")
    return torch.ops.nvfp4.grouped_matmul(a, *plain_parts(stack), offsets, str(out_dtype)[6:])


def check_stack(name: str, stack: Stack, device: torch.device) -> None:
    """A matrix or a stack of them, whose parts belong together."""
    values, scales, global_scales, _ = stack
    if scales is None:
        _check_values(name, values)
        require(values.dim() in (2, 3), name, f"{values.dim()} dimensions", "3, [groups, N, K], or 2, [N, rows]")
    else:
        codes, found = values.shape, (tuple(scales.shape), scales.dtype)
        require(
            values.dtype == torch.uint8 and values.dim() == 3, name, f"codes {values.dtype}", "uint8 [groups, N, K / 2]"
        )
        require(
            codes[2] % 8 == 0 and found == ((*codes[:2], codes[2] // 8), torch.float8_e4m3fn),
            name, f"scales {found}", "float8_e4m3fn [groups, N, K / 16]",
        )  # fmt: skip
        require(
            global_scales.shape == codes[:1] and global_scales.dtype == torch.float32,
            name, f"global scales {global_scales.dtype} {list(global_scales.shape)}", f"float32 [{codes[0]}]",
        )  # fmt: skip
    for part in stack[:3]:
        if part is not None:
            same_device(name, part, device)


def _check_values(name: str, x: Tensor) -> None:
    if not (isinstance(x, Tensor) and x.dtype == torch.float64):
        float_tensor(name, x)
    no_grad(name, x, "nk.experts differentiates")


def plain_parts(stack: Stack) -> tuple[Tensor | None, ...]:
    """The three tensors, E4M3 as bytes, for which torch's tools have kernels."""
    scales = None if stack.scales is None else stack.scales.view(torch.uint8)
    return stack.values, scales, stack.global_scales


def _check_offsets(offsets: Tensor, device: torch.device) -> None:
    require(offsets.dtype == torch.int64, "offsets", offsets.dtype, "int64", TypeError)
    require(offsets.dim() == 1 and offsets.numel() >= 1, "offsets", f"shape {list(offsets.shape)}", "[groups + 1]")
    require(offsets.is_contiguous(), "offsets", f"strides {offsets.stride()}", "contiguous memory")
    same_device("offsets", offsets, device)


def _run(
    a: Tensor, b: Tensor, scales: Tensor | None, global_scales: Tensor | None, offsets: Tensor, out_dtype: str
) -> Tensor:
    arguments = (a, Stack(b, scales, global_scales), offsets, getattr(torch, out_dtype))
    return select("grouped_matmul", *arguments).run(*arguments)


def _fake(a, b, scales, global_scales, offsets, out_dtype: str) -> Tensor:
    shape = (a.shape[0], b.shape[-2]) if b.dim() == 3 else (offsets.shape[0] - 1, a.shape[0], b.shape[0])
    return a.new_empty(shape, dtype=getattr(torch, out_dtype))


_STACK = "Tensor b, Tensor? b_scales, Tensor? b_global"
register(f"grouped_matmul(Tensor a, {_STACK}, Tensor offsets, str out_dtype) -> Tensor", _run, _fake)
