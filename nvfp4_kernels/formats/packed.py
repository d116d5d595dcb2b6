"""PackedNVFP4Tensor: a weight as the CUDA kernels for bf16 tokens read it. Packed once, when a model is loaded; unpacking
gives the same bytes back.

A word holds the eight codes that a lane of a warp multiplies in one tensor-core instruction, four pairs of neighbours along
the row, their bits where a shift and a mask make bf16 of a pair (csrc/matmul/decode.cuh):

    pair p = 2 j + h of the word [slab, tile, 4 g + q, s]: row 16 slab + 8 h + g, columns 64 tile + 16 q + 4 s + 2 j and + 1

A word of scales holds those of one lane for 128 columns: byte 2 h + t for row 16 slab + 8 h + g, block 8 step + 4 t + q, in
ue5m3: five exponent bits, in which E4M3's subnormals are normal numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nvfp4_kernels.formats.layout import ceil_to
from nvfp4_kernels.formats.tensor import NVFP4Tensor, QuantizedTensor

SLAB, TILE, STEP = 16, 64, 128  # rows, columns, columns
SHIFTS = (0, 6, 12)  # how far left pairs 0, 1 and 2 are shifted before the mask
LAST = {15: 2, 8: 10, 7: 2, 6: 2}  # and, bit by bit of bf16, pair 3
TARGETS = {3: 15, 2: 8, 1: 7, 0: 6}  # bit of an E2M1 code: bit of bf16 (sign, two of the exponent, one of the mantissa)


def _place(pair: int, high: int, bit: int) -> int:
    """The bit of the word that holds bit `bit` of the code in a half of a pair."""
    target = TARGETS[bit]
    return (target + 16 * high - (SHIFTS[pair] if pair < 3 else LAST[target])) % 32


def _ue5m3(code: int) -> int:
    """The same value as an E4M3 code 0..126, with an exponent field larger by 3 and no subnormals but zero."""
    if code >= 8 or code == 0:
        return code + 24 if code else 0
    shift = 4 - code.bit_length()  # to the leading one of a subnormal
    return (4 - shift << 3) + ((code << shift) & 7)


LARGEST = 126  # of the codes of block scales: 127 is NaN, larger ones are negative
PACKED_SCALE = [_ue5m3(code) for code in range(LARGEST + 1)]
AT_ONCE = 1 << 26  # values of a weight: packing takes a few times their bytes beside them


def pack(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [..., rows, ceil16(cols) / 2] and scales, of a matrix or a stack of them, in the layout above."""
    lead, length = (*codes.shape[:-2], codes.shape[-2] // SLAB), ceil_to(2 * codes.shape[-1], STEP)
    words = codes.new_empty(*lead, length // TILE, 32, 4, dtype=torch.int32)
    scale_words = codes.new_empty(*lead, length // STEP, 32, dtype=torch.int32)
    given = codes.flatten(0, -2).split(_rows_at_once(length)), scales.flatten(0, -2).split(_rows_at_once(length))
    made = (x.flatten(0, len(lead) - 1).split(_rows_at_once(length) // SLAB) for x in (words, scale_words))
    for some_codes, some_scales, some_words, some_scale_words in zip(*given, *made, strict=True):
        some_words.copy_(_pack_codes(some_codes, length))
        some_scale_words.copy_(_pack_scales(some_scales, length))
    return words, scale_words


def unpack(words: Tensor, scale_words: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """The codes and scales that `pack` was given, of matrices of `cols` columns."""
    lead, used, length = (*words.shape[:-4], words.shape[-4] * SLAB), ceil_to(cols, 16), words.shape[-3] * TILE
    codes = words.new_empty(*lead, used // 2, dtype=torch.uint8)
    scales = words.new_empty(*lead, used // 16, dtype=torch.uint8)
    given = (x.flatten(0, len(lead) - 1).split(_rows_at_once(length) // SLAB) for x in (words, scale_words))
    made = codes.flatten(0, -2).split(_rows_at_once(length)), scales.flatten(0, -2).split(_rows_at_once(length))
    for some_words, some_scale_words, some_codes, some_scales in zip(*given, *made, strict=True):
        some_codes.copy_(_unpack_codes(some_words)[:, : used // 2])
        some_scales.copy_(_unpack_scales(some_scale_words)[:, : used // 16])
    return codes, scales.view(torch.float8_e4m3fn)


def _rows_at_once(length: int) -> int:
    return max(1, AT_ONCE // max(length, 1) // SLAB) * SLAB


def _pack_codes(codes: Tensor, length: int) -> Tensor:
    slabs = codes.shape[0] // SLAB
    codes = torch.nn.functional.pad(codes, (0, length // 2 - codes.shape[1]))
    # [slab, h, g, tile, q, s, j, byte of two codes]
    parts = codes.view(slabs, 2, 8, length // TILE, 4, 4, 2)
    words = torch.zeros(slabs, length // TILE, 8, 4, 4, dtype=torch.int32, device=codes.device)
    for pair in range(4):
        taken = parts[:, pair % 2, :, :, :, :, pair // 2].permute(0, 2, 1, 3, 4).to(torch.int32)
        for high in range(2):
            for bit in range(4):
                words |= ((taken >> (4 * high + bit)) & 1) << _place(pair, high, bit)
    return words.view(slabs, length // TILE, 32, 4)


def _pack_scales(scales: Tensor, length: int) -> Tensor:
    slabs, table = scales.shape[0] // SLAB, torch.tensor(PACKED_SCALE, dtype=torch.int32, device=scales.device)
    blocks = torch.nn.functional.pad(table[scales.view(torch.uint8).int()], (0, length // 16 - scales.shape[1]))
    blocks = blocks.view(slabs, 2, 8, length // STEP, 2, 4)  # [slab, h, g, step, t, q]
    words = sum(blocks[:, h, :, :, t].permute(0, 2, 1, 3) << 8 * (2 * h + t) for h in range(2) for t in range(2))
    return words.to(torch.int32).reshape(slabs, length // STEP, 32)


def _unpack_codes(words: Tensor) -> Tensor:
    slabs, tiles = words.shape[:2]
    words = words.view(slabs, tiles, 8, 4, 4)
    parts = torch.zeros(slabs, 2, 8, tiles, 4, 4, 2, dtype=torch.uint8, device=words.device)
    for pair in range(4):
        byte = sum(
            ((words >> _place(pair, high, bit)) & 1) << (4 * high + bit) for high in range(2) for bit in range(4)
        )
        parts[:, pair % 2, :, :, :, :, pair // 2] = byte.permute(0, 2, 1, 3, 4).to(torch.uint8)
    return parts.view(slabs * SLAB, tiles * TILE // 2)


def _unpack_scales(words: Tensor) -> Tensor:
    slabs, steps = words.shape[:2]
    table = torch.zeros(256, dtype=torch.uint8, device=words.device)
    table[torch.tensor(PACKED_SCALE, device=words.device)] = torch.arange(
        LARGEST + 1, dtype=torch.uint8, device=words.device
    )
    blocks = torch.zeros(slabs, 2, 8, steps, 2, 4, dtype=torch.int32, device=words.device)
    for h in range(2):
        for t in range(2):
            byte = (words.view(slabs, steps, 8, 4) >> 8 * (2 * h + t)) & 0xFF
            blocks[:, h, :, :, t] = byte.permute(0, 2, 1, 3)
    return table[blocks.view(slabs * SLAB, steps * 8).long()]


@dataclass(frozen=True, eq=False, repr=False)
class PackedNVFP4Tensor(QuantizedTensor):
    """A weight [rows, cols] as the CUDA kernels for bf16 tokens read it (layout: formats/packed.py); rows a multiple of 16.

    Made by `pack`; `unpack` gives the same bytes back.

    codes: int32 [rows / 16, ceil64(cols) / 64, 32, 4], the tiles a multiple of two: zeros pad cols to a multiple of 128.
    scales: int32 [rows / 16, ceil128(cols) / 128, 32].
    global_scale, shape, hadamard: as in NVFP4Tensor.
    """

    UNITS = {"codes": TILE, "scales": STEP}

    codes: Tensor
    scales: Tensor
    global_scale: Tensor
    shape: torch.Size
    hadamard: int | None = None

    @classmethod
    def pack(cls, w: NVFP4Tensor) -> "PackedNVFP4Tensor":
        """Raises ValueError for other than two dimensions, rows that are no multiple of 16, a scale that is negative or NaN."""
        if len(w.shape) != 2 or w.shape[0] % SLAB:
            raise ValueError(f"w: got shape {list(w.shape)}; allowed: [rows, cols], rows a multiple of {SLAB}")
        if (w.scales.view(torch.uint8) > LARGEST).any():
            raise ValueError("w: got a block scale that is negative or NaN; allowed: scales of 0 and above")
        return cls(*pack(w.codes, w.scales), w.global_scale, w.shape, w.hadamard)

    def unpack(self) -> NVFP4Tensor:
        """The weight as it was before `pack`."""
        codes, scales = unpack(self.codes, self.scales, self.shape[1])
        return NVFP4Tensor(codes, scales, self.global_scale, self.shape, self.hadamard)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.unpack().dequantize(dtype)


torch.serialization.add_safe_globals([PackedNVFP4Tensor])
