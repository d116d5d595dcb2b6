"""What the Triton kernels share: Triton if it is there, who may call them, and the one place that launches.

With TRITON_INTERPRET=1, set before this is imported, the kernels run on CPU tensors, element by element, where the backend is
forced: for tests, being far too slow to be anybody's choice. A launch can be recorded instead of run, on tensors of the meta
device: so benchmarks/resources.py compiles, for any architecture and without a GPU, exactly what the ops would launch.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from nvfp4_kernels.ops import _device, _dispatch

try:
    import triton
    import triton.language as tl

    missing = None
    jit = triton.jit
    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])
except ImportError:
    triton = None
    version = ()
    tl = SimpleNamespace(constexpr=lambda value: value)  # so that the kernels' files import, to say why they refuse
    missing = "Triton is not installed (pip install triton)"

    def jit(kernel=None, **options):
        return kernel or jit


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _mend_interpreter() -> None:
    """Triton 3.6's interpreter takes int() of an array of one value, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if INTERPRETED and version[:2] == (3, 6):
    _mend_interpreter()

# Called with (kernel, positional arguments, constants, options, grid) in place of each launch, when set.
_recorder: Callable | None = None


def refuses_device(x: Tensor) -> str | None:
    """Why no Triton kernel can serve a call on x's device; None when one can."""
    if missing:
        return missing
    if x.is_cuda:
        return _device.too_old_for_triton(x.device)
    if INTERPRETED and x.is_cpu and _dispatch.forced("triton") or _recorder is not None:
        return None
    return f"the Triton kernels take CUDA tensors, not {x.device.type}"


def launch(
    kernel, grid: tuple[int, ...], *arguments, num_warps: int = 4, num_stages: int = 2, fusion: bool = True, **constants
) -> None:
    """kernel[grid](*arguments, **constants) on the device of the first tensor; nothing when the grid is empty.

    fusion: let the compiler contract a * b + c; bitwise contracts forbid it.
    """
    options = dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fusion)
    if _recorder is not None:
        _recorder(kernel, arguments, constants, options, grid)
        return
    if 0 in grid:
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](*arguments, **constants, **options)


@contextlib.contextmanager
def recorded(capability: tuple[int, int] | None = None) -> Iterator[list[tuple]]:
    """Within it, launches are put on the list that it gives, as (kernel, arguments, constants, options, grid), and not
    run.

    capability: that of the device which the meta tensors stand for.
    """
    global _recorder
    launches: list[tuple] = []
    _recorder = lambda *launch: launches.append(launch)  # noqa: E731
    try:
        with _device.assumed(capability):
            yield launches
    finally:
        _recorder = None


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def as_rows(x: Tensor) -> Tensor:
    """x as [rows, channels] with contiguous channels, without a copy where its strides allow it."""
    x = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return x if x.stride(-1) == 1 else x.contiguous()
