"""E2M1, the 4-bit float of NVFP4: sign in bit 3, two exponent bits, one mantissa bit.

Two values share a byte: element 2j in bits 0-3, element 2j+1 in bits 4-7 (the bytes of torch.float4_e2m1fn_x2).
"""

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the low three bits of the code
MAX = 6.0


def values(device: torch.device | str = "cpu") -> Tensor:
    """The value of each of the 16 codes, fp32 [16]; code 8 is -0.0."""
    magnitudes = torch.tensor(MAGNITUDES, dtype=torch.float32, device=device)
    return torch.cat([magnitudes, -magnitudes])


def floor_code(magnitude: Tensor) -> Tensor:
    """Code of the largest E2M1 magnitude at or below `magnitude` (fp32, >= 0), uint8; saturates at 6."""
    grid = torch.tensor(MAGNITUDES, dtype=torch.float32, device=magnitude.device)
    return (torch.bucketize(magnitude.contiguous(), grid, right=True) - 1).to(torch.uint8)


def with_sign(code: Tensor, x: Tensor) -> Tensor:
    """`code` (magnitude bits) carrying the sign of `x`, as hardware does it: -0.0 keeps its sign, code 8."""
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def round_nearest(x: Tensor) -> Tensor:
    """Codes of `x` (fp32, any shape), round to nearest with ties to the even code, saturating at 6. uint8."""
    magnitude = x.abs()
    below = floor_code(magnitude)
    grid = torch.tensor(MAGNITUDES + (MAGNITUDES[-1],), dtype=torch.float32, device=x.device)
    midpoint = (grid[below.long()] + grid[below.long() + 1]) / 2
    odd = (below & 1).bool()
    up = (magnitude > midpoint) | ((magnitude == midpoint) & odd)
    return with_sign((below + up.to(torch.uint8)).clamp(max=7), x)


def round_stochastic(x: Tensor, random_bytes: Tensor) -> Tensor:
    """Codes of `x` (fp32), each rounded up with probability floor(256 f) / 256, f its distance to the grid below.

    random_bytes: uint8, the shape of x. The rule of cvt.rs.satfinite.e2m1x4.f32: 8 random bits an element,
    up iff r + floor(256 f) >= 256. An exactly representable value never moves.
    """
    magnitude = x.abs().clamp(max=MAX)
    below = floor_code(magnitude)
    grid = torch.tensor(MAGNITUDES, dtype=torch.float32, device=x.device)
    low = grid[below.long()]
    step = torch.where(low < 2, 0.5, torch.where(low < 4, 1.0, 2.0)).to(torch.float32)
    # step is a power of two, so this division is exact
    share = torch.floor((magnitude - low) / step * 256).to(torch.int32)
    up = share + random_bytes.to(torch.int32) >= 256
    return with_sign((below + up.to(torch.uint8)).clamp(max=7), x)


def pack(codes: Tensor) -> Tensor:
    """[..., n] codes (uint8, 0..15; n even) to [..., n / 2] bytes."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """[..., n] bytes to [..., 2 n] codes (uint8, 0..15)."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
