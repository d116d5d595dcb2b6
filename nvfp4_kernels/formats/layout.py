"""Memory layouts of block scales, and the padding of axes to whole blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ceil_to(n: int, multiple: int) -> int:
    """`n` rounded up to a multiple."""
    return (n + multiple - 1) // multiple * multiple


def pad_last(x: Tensor, multiple: int) -> Tensor:
    """`x` with its last axis zero-padded to a multiple."""
    missing = ceil_to(x.shape[-1], multiple) - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def _bytewise(argument: str, x: object) -> None:
    if not isinstance(x, Tensor) or x.itemsize != 1 or x.layout != torch.strided:
        got = f"a {x.layout} tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{argument}: got {got}; allowed: a tensor of one byte an element, as scales are")


def swizzle_128x4(scales: Tensor) -> Tensor:
    """Row-major block scales to the 128x4 tiles that Blackwell's block-scaled GEMMs read (cuBLAS SWIZZLE_32_4_4).

    scales: [rows, blocks], one byte an element. Returns [ceil128(rows) * ceil4(blocks)], the padding zero.
    Raises TypeError for anything else, ValueError for another rank.
    """
    _bytewise("scales", scales)
    if scales.dim() != 2:
        raise ValueError(f"scales: got {scales.dim()} dimensions; allowed: 2, [rows, blocks]")
    rows, blocks = scales.shape
    padded_rows, padded_blocks = ceil_to(rows, 128), ceil_to(blocks, 4)
    # fp8 has no pad kernel: work on bytes
    flat = F.pad(scales.view(torch.uint8), (0, padded_blocks - blocks, 0, padded_rows - rows))
    tiles = flat.view(
        padded_rows // 128, 4, 32, padded_blocks // 4, 4
    )  # [row tile, 32-row quarter, row, column tile, 4]
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scales.dtype)  # [row tile, column tile, row, quarter, 4]


def unswizzle_128x4(swizzled: Tensor, rows: int, blocks: int) -> Tensor:
    """The inverse of swizzle_128x4: [rows, blocks], padding cut. Raises TypeError, or ValueError when the size does not fit."""
    _bytewise("swizzled", swizzled)
    for name, value in (("rows", rows), ("blocks", blocks)):
        if not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name}: got {type(value).__name__}; allowed: an int")
    padded_rows, padded_blocks = ceil_to(rows, 128), ceil_to(blocks, 4)
    if swizzled.numel() != padded_rows * padded_blocks:
        raise ValueError(
            f"swizzled: got {swizzled.numel()} elements; allowed: {padded_rows * padded_blocks} for {rows} x {blocks} scales"
        )
    tiles = swizzled.view(torch.uint8).view(padded_rows // 128, padded_blocks // 4, 32, 4, 4)
    flat = tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_blocks)
    return flat[:rows, :blocks].contiguous().view(swizzled.dtype)
