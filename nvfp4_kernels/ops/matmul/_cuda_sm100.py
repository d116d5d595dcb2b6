"""NVFP4 times NVFP4 through csrc/matmul/sm100.cuh, on the tensor cores of sm_100 and sm_103."""

import struct

import torch
from torch import Tensor

from nvfp4_kernels.formats.layout import ceil_to, pad_last
from nvfp4_kernels.formats.tensor import NVFP4Tensor
from nvfp4_kernels.ops import _cuda, _device
from nvfp4_kernels.ops._cuda import address
from nvfp4_kernels.ops._native import DTYPES
from nvfp4_kernels.ops._tensor_map import encoded

ROWS, WIDTHS = 128, (128, 192)  # of a tile: rows of a, rows of b
STAGES = {128: 5, 192: 4}
STEP = 256  # of k in a stage
THREADS, SCALE_THREADS = 192, 256

LAUNCH = struct.Struct("128s128sQQQQQQqqqiiq40x")  # csrc/matmul/launch_sm100.h; to a multiple of 64
SWIZZLE = struct.Struct("QQQQqqqqq")


def refuses(a, b, bias: Tensor | None, out_dtype: torch.dtype, out: Tensor | None, accumulate: bool) -> str | None:
    return _cuda.refuses_device("matmul", a.codes)


def atoms(width: int) -> int:
    """Of 128 rows each, in a tile of so many."""
    return -(-width // 128)


def shared_bytes(width: int) -> int:
    """Room to begin at a multiple of 1024, the ring's codes and scales, what is on its way out, barriers."""
    stage = (ROWS + width) * STEP // 2 + (1 + atoms(width)) * 128 * STEP // 16
    return 1024 + STAGES[width] * (stage + 16) + (16 << 10) + 48


def width(rows: int, cols: int, processors: int) -> int:
    """Of a tile: what is over first, when each processor takes a tile at a time. What takes a tile its time is to fetch both
    sides (sm100.cuh): that of 192 columns brings 5/4 of what one of 128 does, for 3/2 of the sums."""

    def waves(wide: int) -> int:
        return -(-(-(-rows // ROWS) * -(-cols // wide)) // processors) * (ROWS + wide)

    return min(reversed(WIDTHS), key=waves)


def run(a: NVFP4Tensor, b: NVFP4Tensor, bias: Tensor | None, out: Tensor, accumulate: bool) -> Tensor:
    """out [rows, cols] = a @ b.T + bias, added to what is there with `accumulate`."""
    (rows, cols), blocks = out.shape, a.scales.shape[1]
    if not out.numel():
        return out
    processors = _device.multiprocessors(out.device)
    wide = width(rows, cols, processors)
    left, right = _codes(a), _codes(b)
    a_scales, b_scales = _swizzled(a, b, wide)
    bias = None if bias is None else bias.contiguous()
    parameters = LAUNCH.pack(
        *(encoded(left, ROWS), encoded(right, wide), a_scales.data_ptr(), b_scales.data_ptr()),
        *(a.global_scale.data_ptr(), b.global_scale.data_ptr(), address(bias), out.data_ptr()),
        *(rows, cols, 16 * blocks, 0 if bias is None else DTYPES[bias.dtype], DTYPES[out.dtype], accumulate),
    )
    tiles = -(-rows // ROWS) * -(-cols // wide)
    grid = (min(tiles, processors),)
    _cuda.launch("matmul", f"tcgen05_{wide}", grid, THREADS, shared_bytes(wide), parameters, out)
    return out


def _codes(x: NVFP4Tensor) -> Tensor:
    """Codes as tensor maps want them: rows, and their beginning, at multiples of 16 bytes, so that k is a multiple of 32."""
    codes = pad_last(x.codes.view(torch.uint8), 16).contiguous()
    return codes if codes.data_ptr() % 16 == 0 else codes.clone()


def _swizzled(a: NVFP4Tensor, b: NVFP4Tensor, wide: int) -> tuple[Tensor, Tensor]:
    """Both operands' scales in the tensor cores' order, for tiles of ROWS and of `wide` rows."""
    sides = [x.scales.contiguous() for x in (a, b)]
    blocks, tall = sides[0].shape[1], (ROWS, wide)
    sizes = [
        -(-x.shape[0] // rows) * atoms(rows) * ceil_to(blocks, 4) * 128 for x, rows in zip(sides, tall, strict=True)
    ]
    made = torch.empty(sum(sizes), dtype=torch.uint8, device=a.device).split(sizes)
    pointers = (x.data_ptr() for x in (*sides, *made))
    parameters = SWIZZLE.pack(*pointers, *(x.shape[0] for x in sides), *tall, blocks)
    grid = (min(-(-max(sizes) // (16 * SCALE_THREADS)), 8 * _device.multiprocessors(a.device)), 2)
    _cuda.launch("matmul", "swizzle_scales", grid, SCALE_THREADS, 0, parameters, a.codes)
    return made
