"""quantize through csrc/quantize/cuda.cu: which kernels, over which tiles, with which parameters."""

import struct

import torch
from torch import Tensor

from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.ops import _cuda, _device
from nvfp4_kernels.ops._cuda import address

SIDE, THREADS, STAGES = 64, 128, 3  # csrc/quantize/tiles.cuh
AMAX_THREADS, AMAX_BYTES = 256, 16384  # threads, and the piece of x that a block takes at once
BLOCKS_PER_PROCESSOR = 8

FORM = struct.Struct("QQQqiiii")  # csrc/quantize/launch.h
HEAD, TAIL = struct.Struct("QqqqQqQ"), struct.Struct("qq")
NOTHING = FORM.pack(0, 0, 0, 0, 0, 0, 0, -1)
BLOCKS, CHOICES = {"1x16": 1, "16x16": 2}, {None: 0, "mae": 1, "mse": 2}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

PLAIN, STOCHASTIC, TILED = ("1x16", False, False), ("1x16", True, False), ("16x16", False, False)
# (dtype, row form, column form) as (block, stochastic, rotated): the kernels that know their forms when compiled
KNOWN = {
    ("bf16", PLAIN, None): "row_bf16",
    ("bf16", PLAIN, ("1x16", False, True)): "activation_bf16",
    ("bf16", STOCHASTIC, ("1x16", True, True)): "gradient_bf16",
    ("bf16", TILED, TILED): "weight_bf16",
    ("fp32", TILED, TILED): "weight_fp32",
}


def refuses(x: Tensor, row: QuantSpec | None, col: QuantSpec | None) -> str | None:
    if any(spec is not None and spec.format == "mxfp8" for spec in (row, col)):
        return "the CUDA kernels write NVFP4 alone"
    return _cuda.refuses_device("quantize", x)


def kernel(dtype: torch.dtype, row: QuantSpec | None, col: QuantSpec | None) -> str:
    """The kernel compiled for these forms, or the one that reads them from its parameters."""
    forms = [None if s is None else (s.block, s.stochastic, s.hadamard is not None) for s in (row, col)]
    chooses = any(s is not None and s.four_over_six for s in (row, col))
    known = None if chooses else KNOWN.get((NAMES[dtype], *forms))
    return f"quantize_{known or f'any_{NAMES[dtype]}'}"


def tiles_down(rows: int, cols: int, processors: int) -> int:
    """Tiles that a block walks down: as many as leave one wave of blocks, whose first loads alone nothing covers."""
    down, across = -(-rows // SIDE), -(-cols // SIDE)
    return max(1, min(down, -(-down * across // (BLOCKS_PER_PROCESSOR * processors))))


def shared_bytes(itemsize: int) -> int:
    """Of the ring of tiles."""
    return STAGES * SIDE * SIDE * itemsize


def run(x: Tensor, row: tuple, col: tuple, noise: Tensor | None) -> None:
    """row, col: (QuantSpec or None, (codes, scales, global_scale), how far the noise's offset is ahead)."""
    if x.stride(1) != 1 and x.stride(0) == 1:  # column-major: the transpose is row-major, and its forms change places
        x, row, col = x.t(), col, row
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous()
    processors = _device.multiprocessors(x.device)
    rows, cols = x.shape
    down = tiles_down(rows, cols, processors)
    grid = max(1, -(-cols // SIDE)), max(1, -(-rows // (SIDE * down)))
    shared = shared_bytes(x.element_size())
    name, forms = NAMES[x.dtype], (_form(*row), _form(*col))

    def parameters(rows: int, cols: int, found: Tensor) -> bytes:
        head = HEAD.pack(x.data_ptr(), rows, cols, x.stride(0), found.data_ptr(), found.shape[1], address(noise))
        return head + forms[0] + forms[1] + TAIL.pack(down, _cuda.aligned(x))

    if any(spec is not None and spec.hadamard is not None for spec, *_ in (row, col)):
        found = torch.empty(3, grid[0] * grid[1], dtype=torch.int32, device=x.device)
        given = parameters(rows, cols, found)
        _cuda.launch("quantize", f"amax_transforms_{name}", grid, THREADS, shared, given, x)
    else:
        lines, length = (1, rows * cols) if x.is_contiguous() else (rows, cols)
        pieces = lines * -(-length * x.element_size() // AMAX_BYTES)
        found = torch.empty(
            1, max(1, min(pieces, BLOCKS_PER_PROCESSOR * processors)), dtype=torch.int32, device=x.device
        )
        given = parameters(lines, length, found)
        _cuda.launch("quantize", f"amax_values_{name}", (found.shape[1],), AMAX_THREADS, 0, given, x)
    given = parameters(rows, cols, found)
    _cuda.launch("quantize", kernel(x.dtype, row[0], col[0]), grid, THREADS, shared, given, x)


def _form(spec: QuantSpec | None, parts: tuple[Tensor, ...], advance: int) -> bytes:
    if spec is None:
        return NOTHING
    options = (
        BLOCKS[spec.block],
        spec.stochastic,
        CHOICES[spec.four_over_six],
        -1 if spec.hadamard is None else spec.hadamard,
    )
    return FORM.pack(*(part.data_ptr() for part in parts), advance, *options)
