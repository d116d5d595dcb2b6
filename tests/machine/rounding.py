"""Rounding, exactly: fp64 arithmetic whose last bit remembers what it lost, then one rounding to a format."""

import numpy as np

# format: (significant bits, exponent of the smallest normal number, largest finite value)
FORMATS = {
    "f32": (24, -126, float(np.finfo(np.float32).max)),
    "f16": (11, -14, 65504.0),
    "bf16": (8, -126, float(np.float32(np.uint32(0x7F7F0000).view(np.float32)))),
    "tf32": (11, -126, float(np.uint32(0x7F7FE000).view(np.float32))),
    "e4m3": (4, -6, 448.0),
    "e5m2": (3, -14, 57344.0),
    "e2m1": (2, 0, 6.0),
}
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def odd_sum(a, b):
    """a + b in fp64; where it is not exact, of the two neighbours of the sum the one whose last bit is set."""
    total = a + b
    part = total - a
    rest = (a - (total - part)) + (b - part)
    words = np.asarray(total).view(np.int64)
    even = (words & 1 == 0) & (rest != 0) & np.isfinite(total)
    away = (rest > 0) == (total > 0)
    return np.where(even, np.where(away, words + 1, words - 1), words).view(np.float64)


def fused(a, b, c):
    """a b + c of numbers of at most 24 significant bits, such that rounding it to 50 bits or fewer is the one rounding."""
    return odd_sum(np.asarray(a, np.float64) * np.asarray(b, np.float64), np.asarray(c, np.float64))


def rounded(x, form: str, mode: str = "rn"):
    """fp64 to the values of a format, without its limit above: to nearest, ties to even (rn), away (rna), to 0 (rz),
    down (rm) or up (rp)."""
    bits, smallest, _ = FORMATS[form]
    exponent = np.frexp(np.where((x == 0) | ~np.isfinite(x), 1.0, x))[1]
    step = np.ldexp(1.0, np.maximum(exponent - bits, smallest - bits + 1))
    scaled = x / step
    if mode == "rn":
        whole = np.rint(scaled)
    elif mode == "rz":
        whole = np.trunc(scaled)
    elif mode in ("rm", "rp"):
        whole = np.floor(scaled) if mode == "rm" else np.ceil(scaled)
    elif mode == "rna":
        whole = np.copysign(np.floor(np.abs(scaled) + 0.5), scaled)
    else:
        raise KeyError(mode)
    return np.where(np.isfinite(x), np.copysign(whole * step, x), x)


def to_f32(x, mode="rn"):
    """fp64 to fp32."""
    if mode == "rn":
        return np.asarray(x).astype(np.float32)
    limit = FORMATS["f32"][2]
    y = rounded(x, "f32", mode)
    least, most = (-np.inf if mode == "rm" else -limit), (np.inf if mode == "rp" else limit)  # what overflow gives
    return np.where(np.isfinite(x), np.clip(y, least, most), y).astype(np.float32)


def words16(x, form: str, mode: str = "rn"):
    """fp64 to the bits of fp16 or bf16, NaN as a machine writes it: 0x7FFF."""
    y = rounded(x, form, mode)
    limit = FORMATS[form][2]
    if mode == "rz":
        y = np.where(np.isfinite(x), np.clip(y, -limit, limit), y)
    if form == "f16":
        words = y.astype(np.float16).view(np.uint16)
    else:
        words = (
            np.where(np.abs(y) > limit, np.copysign(np.inf, y), y).astype(np.float32).view(np.uint32) >> 16
        ).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), words)


def values16(words, form: str):
    """The bits of fp16 or bf16 as fp64."""
    words = np.asarray(words, np.uint16)
    if form == "f16":
        return words.view(np.float16).astype(np.float64)
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def small_words(x, form: str):
    """fp64 to the codes of E4M3, E5M2 or E2M1, to nearest, ties to even, saturating; NaN to 0x7F, or E2M1's largest."""
    bits, smallest, limit = FORMATS[form]
    fraction = bits - 1
    y = np.abs(rounded(np.clip(np.nan_to_num(x, nan=0.0, posinf=limit, neginf=-limit), -limit, limit), form))
    y = np.minimum(y, limit)
    exponent = np.maximum(np.frexp(np.where(y == 0, 0.0, y))[1] - 1, smallest)
    exponent = np.where(y < 2.0**smallest, smallest, exponent)
    units = np.ldexp(y, fraction - exponent).astype(np.int64)  # an integer; 2^fraction and more of what is normal
    code = units + np.where(y < 2.0**smallest, 0, (exponent - smallest) << fraction)
    sign = np.signbit(x).astype(np.int64) << (3 if form == "e2m1" else 7)
    nan = 0x7 if form == "e2m1" else 0x7F
    return np.where(np.isnan(x), nan, code | sign).astype(np.uint8)


def small_values(codes, form: str):
    """The codes of E4M3, E5M2 or E2M1 as fp64."""
    codes = np.asarray(codes).astype(np.int64)
    if form == "e2m1":
        return np.where(codes & 8, -1.0, 1.0) * E2M1[codes & 7]
    bits, smallest, _ = FORMATS[form]
    fraction = bits - 1
    exponent, mantissa = codes >> fraction & (1 << 7 - fraction) - 1, codes & (1 << fraction) - 1
    plain = np.where(
        exponent == 0,
        np.ldexp(mantissa.astype(np.float64), smallest - fraction),
        np.ldexp(1.0 + mantissa / (1 << fraction), exponent - 1 + smallest),
    )
    if form == "e4m3":
        plain = np.where(codes & 0x7F == 0x7F, np.nan, plain)
    else:
        plain = np.where(exponent == 31, np.where(mantissa == 0, np.inf, np.nan), plain)
    return np.where(codes & 0x80, -plain, plain)
