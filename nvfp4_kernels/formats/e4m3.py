"""E4M3 (fn: no infinity, 0x7f is NaN, largest value 448), the block scale of NVFP4 and the element of MXFP8."""

import torch
from torch import Tensor

MAX = 448.0


def encode(x: Tensor) -> Tensor:
    """Round fp32 to float8_e4m3fn, to nearest, ties to even, saturating at +-448; NaN stays NaN."""
    return x.clamp(-MAX, MAX).to(torch.float8_e4m3fn)


def decode(x: Tensor) -> Tensor:
    """float8_e4m3fn (or its bytes as uint8) to fp32, exact."""
    return x.view(torch.float8_e4m3fn).to(torch.float32)


def with_unsigned_zeros(x: Tensor) -> Tensor:
    """float8_e4m3fn with 0 for -0."""
    codes = x.view(torch.uint8)
    return codes.masked_fill(codes == 0x80, 0).view(torch.float8_e4m3fn)


def has_negative(x: Tensor) -> bool:
    """Whether a float8_e4m3fn, -0 too, has the sign bit. Reads the values on the host."""
    return bool((x.view(torch.uint8) >= 0x80).any())
