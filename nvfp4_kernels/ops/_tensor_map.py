"""Tensor maps: what the copy engine of sm_90 and newer is told of a matrix in global memory, as 128 opaque bytes.

The driver writes them; for the host model they are TensorMapModel of csrc/arch/host_sm100.h.
"""

import ctypes
import struct

from torch import Tensor

from nvfp4_kernels.ops import _cuda

BYTES = 128
SPAN = 128  # bytes of a box's row, which the swizzle of the same name permutes
# Of cuda.h: CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B
UINT8, SWIZZLE_128B, PROMOTE_256B = 0, 3, 3
MODEL = struct.Struct("QQQQII")


def encoded(x: Tensor, box_rows: int) -> bytes:
    """The map of a contiguous uint8 matrix, its rows and address multiples of 16 bytes, for boxes of SPAN bytes by
    `box_rows`, at most 256. What lies outside the matrix reads as zero."""
    rows, width = x.shape
    if _cuda._model is not None:
        return MODEL.pack(x.data_ptr(), width, rows, width, SPAN, box_rows).ljust(BYTES, b"\0")
    space = ctypes.create_string_buffer(BYTES + 63)  # the driver wants it at a multiple of 64
    at = -(-ctypes.addressof(space) // 64) * 64
    _cuda._check(
        _cuda._driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(at),
            ctypes.c_int(UINT8),
            ctypes.c_uint32(2),
            ctypes.c_void_p(x.data_ptr()),
            (ctypes.c_uint64 * 2)(width, rows),
            (ctypes.c_uint64 * 1)(width),
            (ctypes.c_uint32 * 2)(SPAN, box_rows),
            (ctypes.c_uint32 * 2)(1, 1),  # every element
            ctypes.c_int(0),  # not interleaved
            ctypes.c_int(SWIZZLE_128B),
            ctypes.c_int(PROMOTE_256B),
            ctypes.c_int(0),  # zeros outside
        ),
        "cuTensorMapEncodeTiled",
    )
    return ctypes.string_at(at, BYTES)
