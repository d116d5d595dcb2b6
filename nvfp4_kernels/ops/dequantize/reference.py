"""Decoding in plain torch: value = code * (scale * global_scale), in fp32, then one rounding to the wanted dtype."""

import torch
from torch import Tensor

from nvfp4_kernels.formats import e2m1, e4m3


def refuses(codes: Tensor, scales: Tensor, global_scale: Tensor | None, cols: int, dtype: torch.dtype) -> str | None:
    return None


def run(codes: Tensor, scales: Tensor, global_scale: Tensor | None, cols: int, dtype: torch.dtype) -> Tensor:
    """[rows, cols] in `dtype`. NVFP4: packed codes, E4M3 scales, fp32 global scale. MXFP8: E4M3 codes, E8M0 scales, None."""
    if global_scale is None:
        exponent = scales.to(torch.int32) - 127
        decode = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
        decode = torch.where(scales == 255, torch.nan, decode)
        values = e4m3.decode(codes)
    else:
        decode = e4m3.decode(scales) * global_scale
        values = e2m1.values(codes.device)[e2m1.unpack(codes).long()]
    blocks = values.unflatten(-1, (scales.shape[-1], -1)) * decode.unsqueeze(-1)
    return blocks.flatten(-2)[..., :cols].to(dtype).contiguous()
