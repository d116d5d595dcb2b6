"""8,192 rows of 4,096 values, and single rows, from each format."""

import torch

from nvfp4_kernels.ops.dequantize import triton


def case(format: str, rows: int, cols: int, dtype: torch.dtype):
    def empty(dtype, *shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    def run():
        if format == "nvfp4":
            parts = empty(torch.uint8, rows, cols // 2), empty(torch.uint8, rows, cols // 16), empty(torch.float32)
        else:
            parts = empty(torch.uint8, rows, cols), empty(torch.uint8, rows, cols // 32), None
        triton.run(*parts, cols, dtype)

    return run


CASES = {
    f"{format} {rows}x4096 to {str(dtype)[6:]}": case(format, rows, 4096, dtype)
    for format in ("nvfp4", "mxfp8")
    for rows, dtype in ((8192, torch.bfloat16), (8192, torch.float32), (1, torch.bfloat16))
}
