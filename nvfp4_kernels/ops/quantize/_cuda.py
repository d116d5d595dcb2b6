"""quantize through csrc/quantize/cuda.cu: which kernels, over which tiles, with which parameters."""

import struct

import torch
from torch import Tensor

from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.ops import _cuda, _device
from nvfp4_kernels.ops._cuda import address
from nvfp4_kernels.ops.quantize._forms import Groups, exchanged, put_amax, spares

SIDE, THREADS = 64, 128  # csrc/quantize/tiles.cuh
AMAX_THREADS, AMAX_BYTES = 256, 16384  # threads, and the piece of x that a block takes at once
BLOCKS_PER_PROCESSOR = 8
MOST_MATRICES = 65535  # the third axis of a grid

FORM = struct.Struct("QQQqqiiii8I")  # csrc/quantize/launch.h
HEAD, TAIL = struct.Struct("QqqqqQqQ"), struct.Struct("qqQQqQq")
NOTHING = FORM.pack(0, 0, 0, 0, 0, 0, 0, 0, -1, *[0] * 8)
BLOCKS, CHOICES = {"1x16": 1, "16x16": 2, "1x32": 3}, {None: 0, "mae": 1, "mse": 2}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

PLAIN, STOCHASTIC, TILED = ("1x16", False, False), ("1x16", True, False), ("16x16", False, False)
# (dtype, row form, column form) as (block, stochastic, rotated): the kernels that know their forms when compiled
KNOWN = {
    ("bf16", PLAIN, None): "row_bf16",
    ("bf16", PLAIN, ("1x16", False, True)): "activation_bf16",
    ("bf16", None, ("1x16", False, True)): "gathered_bf16",
    ("bf16", STOCHASTIC, ("1x16", True, True)): "gradient_bf16",
    ("bf16", TILED, TILED): "weight_bf16",
    ("fp32", TILED, TILED): "weight_fp32",
}


def refuses(x: Tensor, row: QuantSpec | None, col: QuantSpec | None) -> str | None:
    if len({spec.format for spec in (row, col) if spec is not None}) == 2:
        return "the CUDA kernels write both forms in the same format"
    if x.dim() == 3 and len(x) > MOST_MATRICES:
        return f"a stack of more than {MOST_MATRICES} matrices"
    return _cuda.refuses_device("quantize", x)


def kernel(dtype: torch.dtype, row: QuantSpec | None, col: QuantSpec | None) -> str:
    """The kernel compiled for these forms, or the one that reads them from its parameters."""
    if any(s is not None and s.format == "mxfp8" for s in (row, col)):
        return f"quantize_mxfp8_{NAMES[dtype]}"
    forms = [None if s is None else (s.block, s.stochastic, s.hadamard is not None) for s in (row, col)]
    chooses = any(s is not None and s.four_over_six for s in (row, col))
    known = None if chooses else KNOWN.get((NAMES[dtype], *forms))
    return f"quantize_{known or f'any_{NAMES[dtype]}'}"


def tiles_down(rows: int, cols: int, processors: int, matrices: int = 1) -> int:
    """Tiles that a block walks down: as many as leave one wave of blocks, whose first loads alone nothing covers."""
    down, across = -(-rows // SIDE), -(-cols // SIDE) * matrices
    return max(1, min(down, -(-down * across // (BLOCKS_PER_PROCESSOR * processors))))


def shared_bytes(itemsize: int) -> int:
    """Of a tile."""
    return SIDE * SIDE * itemsize


def run(
    x: Tensor,
    row: tuple,
    col: tuple,
    noise: Tensor | None,
    groups: Groups | None = None,
    amax: Tensor | None = None,
) -> None:
    """row, col: (QuantSpec or None, (codes, scales, global_scale), how far the noise's offset is ahead).

    x: a matrix, a stack [groups, rows, cols], or with `groups` groups of rows. amax: as quantize's run takes it.
    """
    if x.stride(-1) != 1 and x.stride(-2) == 1 and groups is None:
        # column-major: the transpose is row-major, and its forms change places
        x, row, col, amax = x.mT, col, row, exchanged(amax)
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    (tokens, cols), index = x.shape[-2:], None if groups is None else groups.rows
    rows = tokens if index is None else len(index)
    matrices, stride = (1, 0) if x.dim() == 2 else (x.shape[0], x.stride(0))
    if matrices == 0:
        return
    processors = _device.multiprocessors(x.device)
    down = tiles_down(rows, cols, processors, matrices)
    # a group's last block may have less to do than the others: a block more for each (csrc/quantize/tiles.cuh)
    count = 0 if groups is None else len(groups.offsets) - 1
    parts = -(-rows // (SIDE * down)) if groups is None else rows // (SIDE * down) + count
    grid = max(1, -(-cols // SIDE)), max(1, parts), matrices
    shared = shared_bytes(x.element_size())
    name, forms = NAMES[x.dtype], (_form(*row), _form(*col))
    aligned = _cuda.aligned(x[0] if x.dim() == 3 else x) and stride * x.element_size() % 16 == 0
    places = (0, 0) if groups is None else (address(groups.offsets), address(groups.starts))

    def parameters(rows: int, cols: int, row_stride: int, found: Tensor) -> bytes:
        head = (x.data_ptr(), rows, cols, row_stride, stride, found.data_ptr(), found.shape[-1], address(noise))
        return HEAD.pack(*head) + forms[0] + forms[1] + TAIL.pack(down, aligned, *places, count, address(index), tokens)

    def amaxes(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=x.device)

    transforms = any(spec is not None and spec.hadamard is not None for spec, *_ in (row, col))
    scaled = any(spec is not None and spec.format == "nvfp4" for spec, *_ in (row, col))
    if not scaled:
        found = amaxes(3, 0)
    elif spares(amax, row[0], col[0]):
        found = amaxes(matrices, 3, 1) if groups is None else amaxes(3, count)
    elif groups is not None or transforms:
        found = amaxes(matrices, 3, grid[0] * grid[1]) if groups is None else amaxes(3, count).zero_()
        given = parameters(rows, cols, x.stride(-2), found)
        _cuda.launch("quantize", f"amax_transforms_{name}", grid, THREADS, shared, given, x)
    else:
        lines, length = (1, rows * cols) if x.stride(-2) == cols else (rows, cols)
        pieces = lines * -(-length * x.element_size() // AMAX_BYTES)
        found = amaxes(matrices, 3, max(1, min(pieces, -(-BLOCKS_PER_PROCESSOR * processors // matrices))))
        given = parameters(lines, length, x.stride(-2), found)
        _cuda.launch("quantize", f"amax_values_{name}", (found.shape[2], 1, matrices), AMAX_THREADS, 0, given, x)
    if amax is not None and scaled:
        put_amax(amax, found)
    given = parameters(rows, cols, x.stride(-2), found)
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
    runs = parts[1].shape[-1] * (spec.run // 16)
    signs = spec.hadamard or 0
    turn = [(signs >> 2 * k & 1) << 15 | (signs >> 2 * k + 1 & 1) << 31 for k in range(8)]
    return FORM.pack(*(part.data_ptr() for part in parts), runs, advance, *options, *turn)
