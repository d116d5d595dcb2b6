"""The packed weight: the same bytes back, and each code where the kernels' shifts and masks look for it."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.formats import packed as formats
from nvfp4_kernels.formats.packed import PACKED_SCALE
from tests.oracles.nvfp4_brute import GRID, POSITIVE


def random_weight(rows, cols):
    """Every code under every scale that there is, zero and subnormals included."""
    blocks = (cols + 15) // 16
    codes = torch.randint(0, 256, (rows, blocks * 8), dtype=torch.uint8)
    scales = torch.randint(0, 127, (rows, blocks), dtype=torch.uint8)
    return nk.NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), torch.tensor(0.37), (rows, cols))


@pytest.mark.parametrize("rows, cols", [(16, 16), (32, 128), (48, 1856), (64, 250), (16, 0)])
def test_the_same_bytes_back(rows, cols):
    w = random_weight(rows, cols)
    packed = nk.PackedNVFP4Tensor.pack(w)
    back = packed.unpack()
    assert back.shape == w.shape and torch.equal(back.codes, w.codes)
    assert torch.equal(back.scales.view(torch.uint8), w.scales.view(torch.uint8))
    assert packed.nbytes <= (cols + 127) // 128 * 128 * rows * 9 // 16 + 4


@pytest.mark.parametrize("at_once", [1, 5000, 1 << 26])
def test_a_stack_is_its_matrices_packed(monkeypatch, at_once):
    """However many rows are packed at once."""
    monkeypatch.setattr(formats, "AT_ONCE", at_once)
    matrices = [random_weight(48, 176) for _ in range(3)]
    codes, scales = (torch.stack([getattr(w, part) for w in matrices]) for part in ("codes", "scales"))
    words, scale_words = formats.pack(codes, scales)
    for e, w in enumerate(matrices):
        packed = nk.PackedNVFP4Tensor.pack(w)
        assert torch.equal(words[e], packed.codes) and torch.equal(scale_words[e], packed.scales)
    back = formats.unpack(words, scale_words, 176)
    assert torch.equal(back[0], codes) and torch.equal(back[1].view(torch.uint8), scales.view(torch.uint8))


def bf16(bits: int) -> float:
    return torch.tensor(bits if bits < 1 << 15 else bits - (1 << 16), dtype=torch.int16).view(torch.bfloat16).item()


def test_a_shift_and_a_mask_make_bf16_of_a_pair():
    w = random_weight(16, 128)
    packed = nk.PackedNVFP4Tensor.pack(w)
    nibbles = torch.stack([w.codes & 15, w.codes >> 4], -1).view(16, 128)
    for tile, lane, step in ((0, 0, 0), (1, 31, 3), (0, 13, 2), (1, 6, 1)):
        q = packed.codes[0, tile, lane, step].item() & 0xFFFFFFFF
        rotated = [(q << n | q >> (32 - n)) & 0xFFFFFFFF for n in (12, 10)]
        pairs = [
            q & 0x81C081C0,
            q << 6 & 0x81C081C0,
            rotated[0] & 0x81C081C0,
            q << 2 & 0x80C080C0 | rotated[1] & 0x01000100,
        ]
        for pair, word in enumerate(pairs):
            for high in range(2):
                row = 8 * (pair % 2) + lane // 4
                code = nibbles[row, 64 * tile + 16 * (lane % 4) + 4 * step + 2 * (pair // 2) + high].item()
                value = (-1 if code & 8 else 1) * GRID[code & 7]
                assert bf16(word >> 16 * high & 0xFFFF) == value * 2.0**-126


def test_scales_are_exact_with_one_exponent_more():
    for code, value in enumerate(POSITIVE):
        assert bf16(PACKED_SCALE[code] << 4) == value * 2.0**-117
        assert PACKED_SCALE[code] < 256


def test_what_cannot_be_packed():
    for shape in ((8, 16), (2, 16, 16)):
        with pytest.raises(ValueError, match="w: got shape"):
            nk.PackedNVFP4Tensor.pack(nk.quantize(torch.randn(shape)))
    for byte in (127, 0x80 | 5):
        w = random_weight(16, 16)
        w.scales.view(torch.uint8)[3] = byte
        with pytest.raises(ValueError, match="negative or NaN"):
            nk.PackedNVFP4Tensor.pack(w)


@pytest.mark.parametrize("tokens", [1, 70])
def test_matmul_of_a_packed_weight(tokens):
    """No kernel for packed weights here: any backend, on the weight unpacked."""
    w = nk.quantize(torch.randn(48, 80), block="16x16")
    a, packed = torch.randn(tokens, 80).bfloat16(), nk.PackedNVFP4Tensor.pack(w)
    assert torch.equal(nk.matmul(a, packed), nk.matmul(a, w))
    assert torch.equal(packed.dequantize(), w.dequantize())
    with nk.backend("reference"):
        assert torch.equal(nk.matmul(a, packed), nk.matmul(a, w))
    with pytest.raises(TypeError, match="as b alone"):
        nk.matmul(packed, packed)
