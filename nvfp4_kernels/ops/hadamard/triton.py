"""The random Hadamard transform in Triton: a thread turns whole runs of 16 in registers, four butterfly stages in fp32.

Bytes a value, bf16 in: 2 read, 2 written.
"""

import torch
from torch import Tensor

from nvfp4_kernels.ops._triton import jit, launch, next_power_of_2, refuses_device, tl
from nvfp4_kernels.ops._triton_numerics import (
    BF16_MAX,
    bf16_pair,
    eighths_joined,
    hadamard,
    load_runs,
    readable,
    wide,
)


def refuses(x: Tensor, signs: int) -> str | None:
    return refuses_device(x)


def tile(rows: int, cols: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps: two runs a thread, in rows as long as can be."""
    broad = max(16, min(1024, next_power_of_2(cols)))
    tall = min(4096 // broad, next_power_of_2(rows))
    return tall, broad, max(1, tall * broad // 1024)


@jit
def hadamard_kernel(
    x_ptr, out_ptr, rows, cols, row_stride, col_stride,
    SIGNS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    runs = tl.cdiv(cols, 16)
    across = tl.cdiv(cols, COLS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    run = tl.program_id(0) % across * (COLS // 16) + tl.arange(0, COLS // 16)
    v = hadamard(load_runs(x_ptr, row, run, rows, cols, row_stride, col_stride, WIDE), SIGNS)
    words = ()
    for i in tl.static_range(0, 16, 2):
        low = tl.maximum(tl.minimum(v[i], BF16_MAX, tl.PropagateNan.ALL), -BF16_MAX, tl.PropagateNan.ALL)
        high = tl.maximum(tl.minimum(v[i + 1], BF16_MAX, tl.PropagateNan.ALL), -BF16_MAX, tl.PropagateNan.ALL)
        words += (bf16_pair(low, high),)
    at = (row[:, None].to(tl.int64) * runs + run[None, :])[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    inside = (row < rows)[:, None, None] & (run < runs)[None, :, None]
    tl.store(out_ptr + at, eighths_joined(words), inside)


def run(x: Tensor, signs: int) -> Tensor:
    """x [rows, cols] to bf16 [rows, ceil16(cols)]; signs: 16-bit mask, bit i set = sign i negative."""
    rows, cols = x.shape
    out = torch.empty(rows, -(-cols // 16) * 16, dtype=torch.bfloat16, device=x.device)
    tall, broad, warps = tile(rows, cols)
    launch(
        hadamard_kernel,
        (-(-rows // tall) * -(-cols // broad),),
        *(readable(x), out.view(torch.int32), rows, cols, *x.stride()),
        **dict(SIGNS=signs, WIDE=wide(x), ROWS=tall, COLS=broad),
        num_warps=warps,
        fusion=False,
    )
    return out
