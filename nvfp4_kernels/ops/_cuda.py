"""Launches the kernels of csrc/*/cuda.cu on the current stream, through the driver alone: no CUDA runtime is linked.

A kernel takes one block of parameters, packed here as csrc/<op>/launch.h lays it out. Its code comes from nvcc, when csrc was
built with CUDA, or else from NVRTC at first use (_nvrtc.py).
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nvfp4_kernels.ops import _device, _nvrtc

BUILT = Path(__file__).parent.parent / "_cuda"  # <op>.fatbin and archs.txt, by CMakeLists.txt
MOST_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
# CUDA_ERROR_INVALID_IMAGE, _NO_BINARY_FOR_GPU, _UNSUPPORTED_PTX_VERSION: of code for another chip, or of a newer compiler
UNFIT = 200, 209, 222

# Called in place of the driver, when set, with what `launch` is given: tests run the kernels in csrc/arch/host_model.h.
_model: Callable | None = None


def takes(x: Tensor) -> bool:
    """Whether a call on x is one for these kernels, whatever they say to it."""
    return x.is_cuda or _model is not None


def on_a_chip() -> bool:
    """Whether launches go to a GPU, and not to the host model."""
    return _model is None


def refuses_device(op: str, x: Tensor) -> str | None:
    """Why the kernels of `op` cannot run where x is; None when they can."""
    return None if _model is not None else _refusal(op, x.device)


def refuses_arch(arch: str, x: Tensor) -> str | None:
    """Why kernels that exist for one architecture alone cannot run where x is; None when they can."""
    if _model is not None or _device.cuda_target(x.device) == arch:
        return None
    return f"the kernel is written for sm_{arch}, not for {x.device}"


def refuses_clusters(x: Tensor) -> str | None:
    """Why kernels whose blocks form clusters cannot run where x is; None when they can."""
    if _model is None and _device.cuda_target(x.device) == "80":
        return "blocks form clusters from sm_90 on"
    return None


@functools.lru_cache
def _refusal(op: str, device: torch.device) -> str | None:
    arch = _device.cuda_target(device)
    if arch is None:
        return f"the CUDA kernels are written for sm_80, 90, 100, 103 and 120, not for {device}"
    if not _built(op, arch) and _nvrtc.missing():
        return f"csrc was built without CUDA for {arch} (NVFP4_CUDA=1 builds it), and {_nvrtc.missing()}"
    try:  # what would fail at the launch: a compiler that does not know the chip, a driver too old for the compiler's code
        with torch.cuda.device(device):
            _enter(device)
            _module(op, device)
    except RuntimeError as error:
        if isinstance(error, DriverError) and error.status not in UNFIT:
            raise  # no memory, say, or a graph is being recorded: at another time it may load
        return str(error)
    return None


def _built(op: str, arch: str) -> Path | None:
    """Where nvcc's code for an architecture is, if there is any."""
    archs = BUILT / "archs.txt"
    return BUILT / f"{op}.fatbin" if archs.exists() and arch in archs.read_text().split(";") else None


def launch(
    op: str, kernel: str, grid: tuple[int, ...], threads: int, shared: int, parameters: bytes, x: Tensor
) -> None:
    """kernel<<<grid, threads, shared>>>(parameters) on x's device and its current stream."""
    grid = (*grid, 1, 1)[:3]
    if _model is not None:
        _model(op, kernel, grid, threads, shared, parameters)
        return
    with torch.cuda.device(x.device):
        _enter(x.device)
        function = _function(op, kernel, x.device, shared)
        block = ctypes.create_string_buffer(parameters, len(parameters))
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(block))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check(_driver().cuLaunchKernel(function, *grid, threads, 1, 1, shared, stream, arguments, None), kernel)


def _enter(device: torch.device) -> None:
    """Make the device's context current: a thread of autograd's may have done nothing yet that makes it so."""
    context = ctypes.c_void_p()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(context)), "context")
    if not context:
        _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device.index), "context")
        _check(_driver().cuCtxSetCurrent(context), "context")


@functools.lru_cache
def _function(op: str, kernel: str, device: torch.device, shared: int) -> ctypes.c_void_p:
    function = ctypes.c_void_p()
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), _module(op, device), kernel.encode()), kernel)
    if shared > 48 << 10:  # what a kernel gets unasked
        _check(_driver().cuFuncSetAttribute(function, MOST_SHARED, shared), kernel)
    return function


@functools.lru_cache
def _module(op: str, device: torch.device) -> ctypes.c_void_p:
    """The op's kernels, loaded into the context of the device, which is current."""
    arch = _device.cuda_target(device)
    built = _built(op, arch)
    code = built.read_bytes() if built else _nvrtc.compiled(op, arch)
    module = ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), ctypes.c_char_p(code)), op)
    return module


@functools.lru_cache
def variable(op: str, name: str, device: torch.device) -> int:
    """The address of a variable of the op's kernels."""
    place, size = ctypes.c_void_p(), ctypes.c_size_t()
    with torch.cuda.device(device):
        _enter(device)
        found = _driver().cuModuleGetGlobal_v2(
            ctypes.byref(place), ctypes.byref(size), _module(op, device), name.encode()
        )
    _check(found, name)
    return place.value


def recording(stream: int) -> int:
    """The number, of this process, of the recording of a graph that a stream takes part in."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    places = ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number)
    _check(_driver().cuStreamGetCaptureInfo_v2(*places, None, None, None), "cuStreamGetCaptureInfo")
    return number.value


@functools.lru_cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


class DriverError(RuntimeError):
    """What the driver says; status: its number for it."""

    def __init__(self, what: str, status: int):
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        super().__init__(f"{what}: CUDA driver error {status}: {(text.value or b'unknown').decode()}")
        self.status = status


def _check(status: int, what: str) -> None:
    if status:
        raise DriverError(what, status)


def address(x: Tensor | int | None) -> int:
    if isinstance(x, int):
        return x
    return 0 if x is None else x.data_ptr()


def aligned(x: Tensor) -> bool:
    """Whether each row of a matrix with contiguous rows begins at a multiple of 16 bytes."""
    return x.data_ptr() % 16 == 0 and (x.shape[0] < 2 or x.stride(0) * x.element_size() % 16 == 0)
