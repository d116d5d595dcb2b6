"""Decoding in Triton: value = code * (scale * global_scale), in fp32, then one rounding to the wanted dtype.

A thread takes a 32-bit word of codes, 8 values of E2M1 or 4 of E4M3, and writes them side by side. Bytes a value: NVFP4
0.5625 read, MXFP8 1.03 read; 2 written (4 to fp32).
"""

import torch
from torch import Tensor

from nvfp4_kernels.ops._triton import jit, launch, next_power_of_2, refuses_device, tl
from nvfp4_kernels.ops._triton_numerics import e2m1_value, e4m3_value, e8m0_value, portable, rounded


def refuses(codes: Tensor, scales: Tensor, global_scale: Tensor | None, cols: int, dtype: torch.dtype) -> str | None:
    return refuses_device(codes)


def tile(rows: int, words: int) -> tuple[int, int, int]:
    """Rows and words of a tile, and warps: 4 words a thread, independent of each other, in rows as long as can be."""
    broad = min(512, next_power_of_2(words))
    tall = min(512 // broad, next_power_of_2(rows))
    return tall, broad, max(1, tall * broad // 128)


@jit
def dequantize_kernel(
    codes_ptr, scales_ptr, global_ptr, out_ptr, rows, cols, words,
    NVFP4: tl.constexpr, GLOBAL: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(words, WORDS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    w = tl.program_id(0) % across * WORDS + tl.arange(0, WORDS)
    inside = (row < rows)[:, None] & (w < words)[None, :]
    line = row[:, None].to(tl.int64)
    word = tl.load(codes_ptr + line * words + w[None, :], inside, 0)[:, :, None]
    if NVFP4:
        scale = tl.load(scales_ptr + line * (words // 2) + (w // 2)[None, :], inside, 0).to(tl.int32)
        decode = e4m3_value(scale)
        if GLOBAL:
            decode = decode * tl.load(global_ptr)
        j = tl.arange(0, 8)[None, None, :]
        x = e2m1_value(word >> (4 * j))
        at = w[None, :, None] * 8 + j
    else:
        scale = tl.load(scales_ptr + line * (words // 8) + (w // 8)[None, :], inside, 0).to(tl.int32)
        decode = e8m0_value(scale)
        j = tl.arange(0, 4)[None, None, :]
        x = e4m3_value(word >> (8 * j))
        at = w[None, :, None] * 4 + j
    x = x * decode[:, :, None]
    tl.store(out_ptr + line[:, :, None] * cols + at, rounded(x, out_ptr), (row < rows)[:, None, None] & (at < cols))


def run(codes: Tensor, scales: Tensor, global_scale: Tensor | None, cols: int, dtype: torch.dtype) -> Tensor:
    """[rows, cols] in `dtype`. NVFP4: packed codes, E4M3 scales, fp32 global scale. MXFP8: E4M3 codes, E8M0 scales, None."""
    out = torch.empty(codes.shape[0], cols, dtype=dtype, device=codes.device)
    decode(codes, scales, global_scale, "mxfp8" if global_scale is None else "nvfp4", out)
    return out


def decode(codes: Tensor, scales: Tensor, global_scale: Tensor | None, format: str, out: Tensor) -> None:
    """The values to `out` [rows, cols], contiguous; without a global scale those of NVFP4 under the block scales alone."""
    codes, scales = codes.contiguous().view(torch.int32), scales.contiguous().view(torch.uint8)
    rows, words = codes.shape
    tall, broad, warps = tile(rows, words)
    launch(
        dequantize_kernel,
        (-(-rows // tall) * -(-words // broad),),
        *(codes, scales, scales if global_scale is None else global_scale, portable(out), rows, out.shape[1], words),
        **dict(NVFP4=format == "nvfp4", GLOBAL=global_scale is not None, ROWS=tall, WORDS=broad),
        num_warps=warps,
        fusion=False,
    )
