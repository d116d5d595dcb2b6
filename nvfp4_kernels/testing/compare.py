"""Two outputs side by side: the first place where they differ too much, in words."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.tensor import QuantizedTensor


def difference(
    name: str, got: Tensor | QuantizedTensor, wanted: Tensor | QuantizedTensor, tolerance: float | None
) -> str | None:
    """None when `got` will do, else what is wrong: index and both values. tolerance: as in Case.

    Relative L2 error is measured over the finite values; NaN and infinities must stand at the same places. Integers and
    quantized parts are always compared bit for bit.
    """
    if isinstance(wanted, QuantizedTensor):
        parts = ((f"{name}.{part}", t, wanted.tensors()[part]) for part, t in got.tensors().items())
        return next((text for part in parts if (text := difference(*part, None))), None)
    got, wanted = got.detach().cpu(), wanted.detach().cpu()
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"{name}: got {got.dtype} {list(got.shape)}, want {wanted.dtype} {list(wanted.shape)}"
    if tolerance is None or not wanted.is_floating_point():
        return _first(name, got, wanted, _bits(got) != _bits(wanted))
    got, wanted = got.double(), wanted.double()
    finite = wanted.isfinite()
    apart = torch.where(finite, ~got.isfinite(), ~((got == wanted) | (got.isnan() & wanted.isnan())))
    if apart.any():
        return _first(name, got, wanted, apart)
    error = torch.where(finite, got - wanted, 0.0)
    size = torch.where(finite, wanted, 0.0).norm()
    if error.norm() <= tolerance * size:
        return None
    worst = error.abs() == error.abs().max()
    relative = f"relative error {float(error.norm() / size):.1e} above {tolerance:.0e}, most of it at "
    return _first(name, got, wanted, worst, relative)


def _bits(x: Tensor) -> Tensor:
    """The bytes of each element, NaNs of one dtype counting as one value."""
    if x.is_floating_point():
        wide = x.float() if x.element_size() < 4 else x
        x = torch.where(wide.isnan(), torch.full_like(wide, float("nan")), wide)
        return x.view(torch.int64 if x.element_size() == 8 else torch.int32)
    return x


def _first(name: str, got: Tensor, wanted: Tensor, apart: Tensor, why: str = "") -> str | None:
    if not apart.any():
        return None
    at = tuple(apart.nonzero()[0].tolist())
    share = "" if why else f" ({int(apart.sum())} of {apart.numel()} differ)"
    return f"{name}: {why}{list(at)}: got {got[at].item()!r}, want {wanted[at].item()!r}{share}"
