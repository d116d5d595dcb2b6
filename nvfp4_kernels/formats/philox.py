"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in plain torch.

Every block of 16 elements takes one draw: key = the seed's two words, counter = (block index, offset), two words each.
The 16 bytes of the draw, little-endian, serve elements 0..15; so noise depends on (seed, offset, position) alone.
"""

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF


def _high_low(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product of words held in int64 (which cannot hold the product itself)."""
    b_high, b_low = b >> 16, b & 0xFFFF
    low_part = a * b_low
    high_part = a * b_high + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four output words for each counter; all words are int64 tensors holding 0 .. 2^32 - 1, broadcast together."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _high_low(c0, MULTIPLIERS[0])
        high1, low1 = _high_low(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def _words(x: Tensor) -> tuple[Tensor, Tensor]:
    return x & WORD, (x >> 32) & WORD


def block_bytes(block: Tensor, noise: Tensor, advance: int = 0) -> Tensor:
    """Random bytes for the blocks of these numbers: int64 [blocks] to uint8 [blocks, 16].

    noise: int64 [2], (seed, offset); `advance` is added to the offset.
    """
    words = philox4x32((*_words(block), *_words(noise[1] + advance)), _words(noise[0]))
    shifts = torch.tensor([0, 8, 16, 24], dtype=torch.int64, device=noise.device)
    return ((torch.stack(words, dim=-1).unsqueeze(-1) >> shifts) & 0xFF).flatten(-2).to(torch.uint8)
