"""Finds the compiled module of csrc, nvfp4_kernels._native: `native`, or None and `missing`, the reason."""

import warnings

import torch

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as csrc numbers them
FP8, NVFP4, MXFP8 = 3, 4, 5  # the kinds of a product's operand beyond them

try:
    from nvfp4_kernels import _native as native

    missing = None
except ImportError as error:
    native = None
    if isinstance(error, ModuleNotFoundError) or "cannot import name '_native'" in str(error):
        missing = "the CPU kernels were not built (no C++ compiler at install time); install one and reinstall"
    else:
        missing = f"the CPU kernels do not load: {error}"
    warnings.warn(f"nvfp4_kernels: {missing}. Ops run on the reference backend, which is slow.", stacklevel=2)


def refuses_device(x) -> str | None:
    """Why the module cannot serve a call on x's device; None when it can."""
    if native is None:
        return missing
    return None if x.is_cpu else f"the CPU kernels take CPU tensors, not {x.device.type}"


def refuses_float(x) -> str | None:
    """As refuses_device, and why not for x's dtype."""
    if refuses_device(x) is None and x.dtype not in DTYPES:
        return f"the CPU kernels take {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, not {x.dtype}"
    return refuses_device(x)


def empty(*shape, dtype: torch.dtype) -> torch.Tensor:
    """torch.empty in the memory that the module writes to, whatever torch.set_default_device says."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


def check(status: int) -> None:
    """Raise what a status of the module means."""
    if status:
        raise MemoryError("nvfp4_kernels: no memory for the CPU kernels' buffers; use smaller tensors or fewer threads")
