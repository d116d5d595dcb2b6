"""a @ b.T through csrc/matmul: on CPUs quantized operands are decoded exactly to bf16 (or fp32) in cache-sized blocks; on GPUs
bf16 meets a packed weight, and NVFP4 meets NVFP4 on the FP4 tensor cores for which there is a kernel."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.packed import PackedNVFP4Tensor
from nvfp4_kernels.formats.tensor import MXFP8Tensor, NVFP4Tensor
from nvfp4_kernels.ops import _cuda, _device, _dispatch
from nvfp4_kernels.ops._native import DTYPES, MXFP8, NVFP4, check, empty, native, refuses_device
from nvfp4_kernels.ops.matmul import _cuda as packed
from nvfp4_kernels.ops.matmul import _cuda_sm100, _cuda_sm120

Operand = NVFP4Tensor | PackedNVFP4Tensor | MXFP8Tensor | Tensor
# Kernels for NVFP4 times NVFP4, by the instruction of the device's FP4 tensor cores.
BLOCK_SCALED = {"tcgen05": _cuda_sm100, "mma.sync": _cuda_sm120}
# They have run in the host model alone. Of two that nobody has measured, Triton's comes first: its compiler has run elsewhere.
UNPROVEN = (
    "not yet run on such a chip: NVFP4_BACKEND=native,triton,reference takes it, nvfp4 check tells whether it is right, "
    "nvfp4 tune takes it where it is right and faster"
)


def _cuda_kernels(a: Operand, b: Operand):
    """The module whose affair such operands are on a GPU, whatever it says to them."""
    both = isinstance(a, NVFP4Tensor) and isinstance(b, NVFP4Tensor)
    return BLOCK_SCALED.get(_device.fp4_tensor_cores(a.device), packed) if both else packed


def _on_gpu(a: Operand, b: Operand) -> bool:
    return isinstance(b, PackedNVFP4Tensor) or _cuda.takes(a if isinstance(a, Tensor) else a.codes)


def refuses(
    a: Operand, b: Operand, bias: Tensor | None, out_dtype: torch.dtype, out: Tensor | None, accumulate: bool
) -> str | None:
    if _on_gpu(a, b):
        kernels = _cuda_kernels(a, b)
        unproven = kernels is not packed and _cuda.on_a_chip() and not _dispatch.forced("native")
        unproven = unproven and _dispatch.measured("matmul", (a, b)) != "native"
        return kernels.refuses(a, b, bias, out_dtype, out, accumulate) or (UNPROVEN if unproven else None)
    return refuses_device(a if isinstance(a, Tensor) else a.codes)


def outruns_torch(dtype: torch.dtype) -> bool:
    """Whether large products of `dtype` on the CPU are faster here. In fp32: torch's are MKL's, and the processor an AMD with
    AVX-512. In bf16 and fp16: torch makes them without instructions for them, on a processor with AVX2 alone."""
    if native is None or dtype not in DTYPES:
        return False
    if dtype == torch.float32:
        return native.outruns_mkl() and _device.multiplies_by_mkl()
    return native.isa() != "scalar" and _device.slow_in_16_bits()


def run(
    a: Operand, b: Operand, bias: Tensor | None, out_dtype: torch.dtype, out: Tensor | None, accumulate: bool
) -> Tensor:
    """y [M, N] = (g_a g_b) * sum_k decode(a)[m, k] decode(b)[n, k] + bias, fp32 until one rounding at the end."""
    if _on_gpu(a, b):
        out = torch.empty(a.shape[0], b.shape[0], dtype=out_dtype, device=a.device) if out is None else out
        return _cuda_kernels(a, b).run(a, b, bias, out, accumulate)
    left, right = _operand(a), _operand(b)  # they hold the tensors alive
    if out is None:
        out = empty(left[0][4], right[0][4], dtype=out_dtype)
    bias = None if bias is None else bias.contiguous()
    status = native.matmul(
        left[0],
        right[0],
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPES[bias.dtype],
        out.data_ptr(),
        DTYPES[out.dtype],
        accumulate,
        torch.get_num_threads(),
    )
    check(status)
    return out


def _operand(x: Operand) -> tuple:
    """What csrc/bindings.cpp calls an operand, and the tensors behind its pointers."""
    if isinstance(x, Tensor):
        return (DTYPES[x.dtype], x.data_ptr(), 0, 0, *x.shape, *x.stride()), x
    codes, scales = x.codes.contiguous(), x.scales.contiguous()
    rows, cols = len(codes), codes.shape[1] * (2 if isinstance(x, NVFP4Tensor) else 1)
    places, shape = (codes.data_ptr(), scales.data_ptr()), (rows, cols, cols, 1)
    if isinstance(x, NVFP4Tensor):
        return (NVFP4, *places, x.global_scale.data_ptr(), *shape), (codes, scales, x.global_scale)
    return (MXFP8, *places, 0, *shape), (codes, scales)
