"""matmul: a @ b.T where either operand may be NVFP4, MXFP8 or plain."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.packed import PackedNVFP4Tensor
from nvfp4_kernels.formats.tensor import MXFP8Tensor, NVFP4Tensor, QuantizedTensor
from nvfp4_kernels.ops._check import FLOATS, float_tensor, no_grad, require, same_device
from nvfp4_kernels.ops._dispatch import candidates, implementation, select
from nvfp4_kernels.ops._library import ordinary, register, unobserved

Operand = NVFP4Tensor | PackedNVFP4Tensor | MXFP8Tensor | Tensor


def matmul(
    a: Operand,
    b: Operand,
    out_dtype: torch.dtype | None = None,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """y = a @ b.T + bias, products exact, summed in fp32, rounded once to `out_dtype`.

    a: [..., M, K] (leading axes count as rows), b: [N, K]; each an NVFP4Tensor, an MXFP8Tensor or a bf16, fp16 or fp32
        tensor of any strides; b a PackedNVFP4Tensor too, which CUDA's kernels for bf16 read in place and which is unpacked for
        all others. Operands that went through the Hadamard transform must share its signs.
    out_dtype: bfloat16, float16 or float32; by default out's dtype, else that of a plain operand, else bfloat16.
    bias: [N], bf16, fp16 or fp32, or None.
    out: a contiguous tensor [..., M, N] to write to; it must not share memory with an operand.
    accumulate: add to `out` (fp32) instead of overwriting it.

    Returns y [..., M, N] (`out` when given). A non-finite global scale gives NaN everywhere.
    Raises TypeError, ValueError or RuntimeError naming the argument: wrong dtype, device or rank, K of 0 or different
    K, different signs, an `out` that is read-only (an inference tensor, a leaf that requires grad), overlaps itself or an
    operand.
    """
    _check_operand("a", a)
    _check_operand("b", b)
    require(len(b.shape) == 2, "b", f"{len(b.shape)} dimensions", "2, [N, K]")
    require(
        a.shape[-1] == b.shape[-1],
        "a and b",
        f"K = {a.shape[-1]} and K = {b.shape[-1]}",
        "equal K, the last axis of both",
    )
    require(a.shape[-1] > 0, "a", f"shape {list(a.shape)}", "K of at least 1")
    same_device("b", b, a.device)
    require(not isinstance(a, PackedNVFP4Tensor), "a", "PackedNVFP4Tensor", "a packed weight as b alone", TypeError)
    signs_a, signs_b = (getattr(x, "hadamard", None) if isinstance(x, QuantizedTensor) else None for x in (a, b))
    require(signs_a == signs_b, "a and b", f"Hadamard signs {signs_a} and {signs_b}", "the same transform on both")
    if out_dtype is None:
        plain = [x.dtype for x in (out, a, b) if isinstance(x, Tensor)]
        out_dtype = plain[0] if plain else torch.bfloat16
    require(out_dtype in FLOATS, "out_dtype", out_dtype, "bfloat16, float16, float32", TypeError)
    if bias is not None:
        float_tensor("bias", bias)
        no_grad("bias", bias, "nk.linear differentiates")
        require(tuple(bias.shape) == (b.shape[0],), "bias", f"shape {list(bias.shape)}", f"[{b.shape[0]}]")
        same_device("bias", bias, a.device)
    shape = (*a.shape[:-1], b.shape[0])
    if out is None:
        require(not accumulate, "accumulate", "True without out", "out=, an fp32 tensor to add to")
        return torch.ops.nvfp4.matmul(*_flat(a), *_flat(b), bias, str(out_dtype)[6:]).view(shape)
    _check_out(out, shape, out_dtype, accumulate, (a, b, bias))
    torch.ops.nvfp4.matmul_out(*_flat(a), *_flat(b), bias, out.view(-1, shape[-1]), accumulate)
    return out


def few_rows(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """a @ b.T + bias of plain operands where that is faster here than torch's; None where it is not, or nothing fits.

    That is for a few rows of bf16 on a CPU, without gradients. Measured beside torch on two cores with AVX-512 and bf16, b
    from 1168x256 to 4384x1024: 1.3 to 2.5 times with one row, 1.1 to 1.9 with eight, less than once with sixteen. Where torch
    has no instructions for 16 bits, it is for any number of rows of bf16 or fp16.
    """
    if not (a.is_cpu and b.is_cpu and ordinary(b) and unobserved(a)):
        return None
    n, k = b.shape
    fits = a.dtype == b.dtype and a.shape[-1] == k and a.numel() > 0
    added = bias is None or bias.is_cpu and ordinary(bias) and bias.dtype in FLOATS and bias.shape == (n,)
    if not fits or not added:
        return None
    native = implementation("matmul", "native")
    few = a.dtype == torch.bfloat16 and a.numel() <= 8 * k and native.native is not None
    if candidates("matmul")[0] != "native" or not (few or a.dtype != torch.float32 and native.outruns_torch(a.dtype)):
        return None
    if a.dim() == 2:  # a decoded token pays for every view
        return native.run(a, b, bias, a.dtype, None, False)
    return native.run(a.reshape(-1, k), b, bias, a.dtype, None, False).view(*a.shape[:-1], n)


def _check_operand(name: str, x: Operand) -> None:
    if isinstance(x, QuantizedTensor):
        return
    require(isinstance(x, Tensor), name, type(x).__name__, "NVFP4Tensor, MXFP8Tensor or torch.Tensor", TypeError)
    float_tensor(name, x)
    require(x.dim() >= 2, name, f"{x.dim()} dimensions", "at least 2")
    no_grad(name, x, "nk.linear differentiates")


def _check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, accumulate: bool, operands: tuple) -> None:
    float_tensor("out", out)
    require(out.dtype == dtype, "out", out.dtype, f"{dtype}, the out_dtype", TypeError)
    require(tuple(out.shape) == shape, "out", f"shape {list(out.shape)}", f"{list(shape)}")
    require(out.is_contiguous(), "out", f"strides {out.stride()}", "contiguous memory, each element its own")
    read_only = (out.is_inference() and not torch.is_inference_mode_enabled()) or (
        out.requires_grad and out.is_leaf and torch.is_grad_enabled()
    )
    require(
        not read_only,
        "out",
        "a read-only tensor (inference tensor, or leaf that requires grad)",
        "a writable one",
        RuntimeError,
    )
    require(not accumulate or dtype == torch.float32, "accumulate", f"True with {dtype}", "True with a float32 out")
    own = _span(out)
    for operand in operands:
        parts = operand.tensors().values() if isinstance(operand, QuantizedTensor) else [operand]
        clash = any(p is not None and p.numel() and _overlap(own, _span(p)) for p in parts)
        require(not clash, "out", "memory that an operand uses too", "memory of its own")


def _span(x: Tensor) -> tuple[int, int]:
    """First and one-past-last byte that `x` can touch."""
    reach = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
    return x.data_ptr(), x.data_ptr() + reach * x.element_size()


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _flat(x: Operand) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """An operand as (values or codes [rows, K], scales, global_scale); fp8 as bytes, for which torch's tools have kernels."""
    if isinstance(x, Tensor):
        return x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), None, None
    if isinstance(x, PackedNVFP4Tensor):
        return x.codes, x.scales, x.global_scale
    codes, scales = x.codes.view(torch.uint8), x.scales.view(torch.uint8)
    return codes.flatten(0, -2), scales.flatten(0, -2), getattr(x, "global_scale", None)


def _operand(values: Tensor, scales: Tensor | None, global_scale: Tensor | None) -> Operand:
    if scales is None:
        return values
    if values.dtype == torch.int32:
        return PackedNVFP4Tensor(values, scales, global_scale, (_rows(values), 64 * values.shape[1]))
    if global_scale is None:
        return MXFP8Tensor(values.view(torch.float8_e4m3fn), scales, values.shape)
    return NVFP4Tensor(values, scales.view(torch.float8_e4m3fn), global_scale, (values.shape[0], 2 * values.shape[1]))


def _rows(values: Tensor) -> int:
    return 16 * values.shape[0] if values.dtype == torch.int32 else values.shape[0]


def _serve(a: Operand, b: Operand, *rest) -> Tensor:
    packed = isinstance(b, PackedNVFP4Tensor)
    if packed and ("native" not in candidates("matmul") or implementation("matmul", "native").refuses(a, b, *rest)):
        b = b.unpack()
    return select("matmul", a, b, *rest).run(a, b, *rest)


def _run(a, a_scales, a_global, b, b_scales, b_global, bias, out_dtype: str) -> Tensor:
    left, right = _operand(a, a_scales, a_global), _operand(b, b_scales, b_global)
    return _serve(left, right, bias, getattr(torch, out_dtype), None, False)


def _run_out(a, a_scales, a_global, b, b_scales, b_global, bias, out: Tensor, accumulate: bool) -> None:
    left, right = _operand(a, a_scales, a_global), _operand(b, b_scales, b_global)
    _serve(left, right, bias, out.dtype, out, accumulate)


def _fake(a, a_scales, a_global, b, b_scales, b_global, bias, out_dtype: str) -> Tensor:
    return a.new_empty(a.shape[0], _rows(b), dtype=getattr(torch, out_dtype))


def _fake_out(a, a_scales, a_global, b, b_scales, b_global, bias, out: Tensor, accumulate: bool) -> None:
    return None


_OPERANDS = "Tensor a, Tensor? a_scales, Tensor? a_global, Tensor b, Tensor? b_scales, Tensor? b_global, Tensor? bias"
register(f"matmul({_OPERANDS}, str out_dtype) -> Tensor", _run, _fake)
register(f"matmul_out({_OPERANDS}, Tensor(a!) out, bool accumulate) -> ()", _run_out, _fake_out)
