"""NVFP4 value by value in Python and numpy float32: a stranger to the package, written from the definition of the format.

Slow on purpose: the nearest E2M1 value is found by comparing with all of them, E4M3 by listing all 256 bytes.
"""

import numpy as np

F = np.float32
GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e4m3_value(byte: int) -> float:
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if sign else magnitude


POSITIVE = [e4m3_value(b) for b in range(127)]


def nearest_even(x: float, grid: list[float]) -> int:
    """Index of the nearest grid value; ties go to the even index; beyond the end, the last."""
    distance = [abs(x - g) for g in grid]
    best = min(distance)
    ties = [i for i, d in enumerate(distance) if d == best]
    return ties[0] if len(ties) == 1 else next(i for i in ties if i % 2 == 0)


def philox(counter: list[int], key: list[int]) -> list[int]:
    mask = 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key[0], b & mask, a >> 32 ^ counter[3] ^ key[1], a & mask]
        key = [key[0] + 0x9E3779B9 & mask, key[1] + 0xBB67AE85 & mask]
    return counter


def random_byte(block: int, element: int, seed: int, offset: int) -> int:
    mask = 0xFFFFFFFF
    words = philox([block & mask, block >> 32, offset & mask, offset >> 32 & mask], [seed & mask, seed >> 32 & mask])
    return words[element // 4] >> 8 * (element % 4) & 255


def quantize_1x16(x: np.ndarray, seed_offset: tuple[int, int] | None = None, amax: float | None = None):
    """codes (one a byte) [rows, cols], scale bytes [rows, cols / 16], global scale; cols a multiple of 16, x finite float32."""
    with np.errstate(all="ignore"):
        amax = F(np.abs(x).max() if amax is None else amax)
        g_enc = F(1) if amax == 0 else min(F(F(2688) / amax), np.finfo(F).max)
        k, g_dec = F(g_enc * F(1 / 6)), F(F(1) / g_enc)
        codes = np.zeros(x.shape, np.uint8)
        scales = np.zeros((x.shape[0], x.shape[1] // 16), np.uint8)
        for r in range(x.shape[0]):
            for b in range(x.shape[1] // 16):
                block = x[r, 16 * b : 16 * b + 16]
                scales[r, b] = nearest_even(min(float(F(np.abs(block).max() * k)), 448.0), POSITIVE)
                decode = F(F(POSITIVE[scales[r, b]]) * g_dec)
                enc = np.finfo(F).max if decode == 0 else min(F(F(1) / decode), np.finfo(F).max)
                for j, value in enumerate(block):
                    v = abs(float(np.clip(F(value * enc), F(-6), F(6))))
                    if seed_offset is None:
                        code = nearest_even(v, GRID)
                    else:
                        low = max(i for i, g in enumerate(GRID) if g <= v)
                        step = 0.5 if GRID[low] < 2 else 1.0 if GRID[low] < 4 else 2.0
                        share = int(256 * (v - GRID[low]) / step)
                        code = min(7, low + (random_byte(r * scales.shape[1] + b, j, *seed_offset) + share >= 256))
                    codes[r, 16 * b + j] = code | (8 if np.signbit(value) else 0)
    return codes, scales, g_dec


def mean_and_variance(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the values that x decodes to, over all random bytes, fp64 [rows, cols]; for x without blocks of zeros."""
    _, scales, g_dec = quantize_1x16(x)
    decode = np.float32(POSITIVE)[scales].repeat(16, 1) * g_dec
    v = np.minimum(np.abs(x * (F(1) / decode)), F(6)).astype(np.float64)
    low = np.searchsorted(GRID, v, "right") - 1
    step = np.diff(GRID, append=8.0)[low]
    share = np.floor(256 * (v - np.array(GRID)[low]) / step) / 256
    mean = np.sign(x) * (np.array(GRID)[low] + share * step) * decode
    return mean, share * (1 - share) * (step * decode) ** 2
