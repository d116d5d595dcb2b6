"""Arithmetic, bits and conversions of the machine against integers, fractions and torch's casts."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.machine import conversions
from tests.machine.kernels import elementwise, kernel, launch
from tests.machine.memory import Fault

WORDS = np.array(
    [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xDEADBEEF,
     0xFFFFFFFE, 0xFFFFFFFF], np.uint32,
)  # fmt: skip
LONG = np.concatenate([WORDS.astype(np.uint64), WORDS.astype(np.uint64) << 32, ~WORDS.astype(np.uint64)])
FLOATS = np.array(
    [0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x80800000, 0x33800000, 0x3F000000, 0x3F7FFFFF,
     0x3F800000, 0x3F800001, 0xBF800000, 0x3FC00000, 0x40490FDB, 0x4B800001, 0xCB7FFFFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000,
     0xFF800000, 0x7FC00000, 0xFFC00001, 0x1E3CE508, 0x20000001], np.uint32,
)  # fmt: skip


def crossed(*arrays):
    return [x.ravel() for x in np.meshgrid(*arrays, indexing="ij")]


def signed(x, bits=32):
    x = int(x) & (1 << bits) - 1
    return x - (1 << bits) if x >> bits - 1 else x


def ints(text, oracle, *inputs, dtype=np.uint32, bits=32):
    """Compare with a function of Python's integers, at every combination of the inputs' elements."""
    inputs = crossed(*inputs)
    got = elementwise(text, dtype, *inputs)
    want = [oracle(*(int(x) for x in row)) & (1 << bits) - 1 for row in zip(*inputs, strict=True)]
    assert got.tolist() == want


# Floating point: a value is a fraction, or "nan", "inf", "-inf", or "-0"


def fraction(word):
    sign, exponent, mantissa = word >> 31, word >> 23 & 255, word & 0x7FFFFF
    if exponent == 255:
        return "nan" if mantissa else ("-inf" if sign else "inf")
    if not exponent and not mantissa:
        return "-0" if sign else Fraction(0)
    size = Fraction(mantissa + (1 << 23 if exponent else 0)) * Fraction(2) ** (max(exponent, 1) - 150)
    return -size if sign else size


def round_to(x: Fraction, mode="rn", fraction_bits=23, exponent_bits=8):
    """The bits of the float nearest to a fraction other than zero, ties to even, or next to it toward zero, below, above."""
    bias = (1 << exponent_bits - 1) - 1
    sign, size = int(x < 0), abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    exponent = max(exponent, 1 - bias)
    scaled = size / Fraction(2) ** (exponent - fraction_bits)
    whole = scaled.numerator // scaled.denominator
    rest = scaled - whole
    if mode == "rn" and (rest > Fraction(1, 2) or rest == Fraction(1, 2) and whole & 1):
        whole += 1
    away = mode == ("rm" if sign else "rp")
    if away and rest:
        whole += 1
    word = whole + (exponent + bias - 1 << fraction_bits)  # an implicit bit counts as one step of the exponent
    top = (1 << exponent_bits) - 1 << fraction_bits
    if word >= top:
        word = top if mode == "rn" or away else top - 1
    return word | sign << fraction_bits + exponent_bits


def negative(x):
    return x in ("-0", "-inf") if isinstance(x, str) else x < 0


def number(x):
    return Fraction(0) if x == "-0" else x


def times(a, b):
    if "nan" in (a, b):
        return "nan"
    infinite = any(x in ("inf", "-inf") for x in (a, b))
    if infinite and any(number(x) == 0 for x in (a, b)):
        return "nan"
    minus = negative(a) != negative(b)
    if infinite:
        return "-inf" if minus else "inf"
    exact = number(a) * number(b)
    return "-0" if exact == 0 and minus else exact


def plus(a, b, mode="rn"):
    if "nan" in (a, b) or {"inf", "-inf"} <= {a, b}:
        return "nan"
    for end in ("inf", "-inf"):
        if end in (a, b):
            return end
    exact = number(a) + number(b)
    if exact == 0 and (a == b == "-0" or mode == "rm" and not a == b == Fraction(0)):
        return "-0"  # x - x, 0 - 0 too where one rounds down
    return exact


def to_word(x, mode="rn", **form):
    if x == "nan":
        return 0x7FFFFFFF
    if x in ("inf", "-inf"):
        return 0x7F800000 if x == "inf" else 0xFF800000
    if x == "-0":
        return 0x80000000
    return round_to(x, mode, **form) if x else 0


def flush(x):
    if isinstance(x, str) or x == 0 or abs(x) >= Fraction(2) ** -126:
        return x
    return "-0" if x < 0 else Fraction(0)


def floats(text, oracle, *inputs):
    got = elementwise(text, np.uint32, *inputs)
    want = np.array([oracle(*(fraction(int(x)) for x in row)) for row in zip(*inputs, strict=True)], np.uint32)
    wrong = got != want
    assert not wrong.any(), [hex(int(x[wrong][0])) for x in (*inputs, got, want)]


RANDOM = np.random.default_rng(3).integers(0, 1 << 32, 400, np.uint32)


@pytest.mark.parametrize(("mode", "ftz"), (("rn", ""), ("rn", ".ftz"), ("rz", ".ftz"), ("rm", ""), ("rp", "")))
def test_add_sub_mul(mode, ftz):
    pairs = [np.concatenate([x, y]) for x, y in zip(crossed(FLOATS, FLOATS), (RANDOM[:200], RANDOM[200:]), strict=True)]
    near = RANDOM[:200] ^ np.uint32(0x80000035)  # sums that cancel
    pairs = [np.concatenate([pairs[0], RANDOM[:200]]), np.concatenate([pairs[1], near])]
    inner = flush if ftz else (lambda x: x)

    def minus(b):
        return b if b == "nan" else times(b, Fraction(-1))

    sums = (("add", lambda a, b: plus(a, b, mode)), ("sub", lambda a, b: plus(a, minus(b), mode)))
    for name, exact in (*sums, ("mul", times)):

        def oracle(a, b, exact=exact):
            word = to_word(exact(inner(a), inner(b)), mode)
            return to_word(inner(fraction(word)))

        floats(f"{name}.{mode}{ftz}.f32 d, a, b;", oracle, *pairs)


@pytest.mark.parametrize("mode", ("rn", "rz", "rm", "rp"))
def test_fma(mode):
    triples = crossed(FLOATS, FLOATS[::2], FLOATS[::2])
    floats(f"fma.{mode}.f32 d, a, b, c;", lambda a, b, c: to_word(plus(times(a, b), c, mode), mode), *triples)


@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3, st.integers(0, 1 << 32)), min_size=8, max_size=8))
@settings(max_examples=20, deadline=None)
def test_fma_of_close_magnitudes(rows):
    """The addend near the product, so that bits far below decide."""
    a, b, c = [], [], []
    for x, y, z, seed in rows:
        noise = np.random.default_rng(seed)
        a.append(int(noise.integers(0, 1 << 24)) | (64 + x // 2) << 23)
        b.append(int(noise.integers(0, 1 << 24)) | (64 + y // 2) << 23)
        product = fraction(a[-1]) * fraction(b[-1])
        c.append(round_to(-product * Fraction(2) ** (z % 60 - 30), "rz") ^ (z & 1) << 31)
    a, b, c = (np.array(x, np.uint32) for x in (a, b, c))
    floats("fma.rn.f32 d, a, b, c;", lambda a, b, c: to_word(plus(times(a, b), c)), a, b, c)
    floats("fma.rz.f32 d, a, b, c;", lambda a, b, c: to_word(plus(times(a, b), c), "rz"), a, b, c)


def test_saturation():
    def oracle(a, b):
        x = plus(a, b)
        if x == "nan" or negative(x) or number(x) == 0:
            return 0
        return 0x3F800000 if x == "inf" or x >= 1 else to_word(x)

    floats("add.sat.f32 d, a, b;", oracle, *crossed(FLOATS, FLOATS))


@pytest.mark.parametrize("form", ("bf16", "f16"))
def test_packed_fma(form):
    bits = {"bf16": (7, 8), "f16": (10, 5)}[form]
    words = np.array([0, 0x8000, 1, 0x3F80, 0x3F81, 0x3C00, 0x3C01, 0xBC00, 0x4049, 0x7BFF, 0x5BFF], np.uint16)

    def value(word):
        fraction_bits, exponent_bits = bits
        bias, exponent = (1 << exponent_bits - 1) - 1, word >> fraction_bits & (1 << exponent_bits) - 1
        mantissa = word & (1 << fraction_bits) - 1
        if not exponent and not mantissa:
            return "-0" if word >> 15 else Fraction(0)
        size = Fraction(mantissa + ((1 << fraction_bits) if exponent else 0))
        size *= Fraction(2) ** (max(exponent, 1) - bias - fraction_bits)
        return -size if word >> 15 else size

    a, b, c = crossed(words, words, words)
    want = []
    for row in zip(a, b, c, strict=True):
        x, y, z = (value(int(w)) for w in row)
        exact = plus(times(x, y), z)
        want.append(0x8000 if exact == "-0" else round_to(exact, "rn", *bits) if exact else 0)
    want = np.array(want, np.uint16)
    double = [x.astype(np.uint32) | np.roll(x, 1).astype(np.uint32) << np.uint32(16) for x in (a, b, c)]
    got = elementwise(f"fma.rn.{form}x2 d, a, b, c;", np.uint32, *double)
    assert (got == (want.astype(np.uint32) | np.roll(want, 1).astype(np.uint32) << np.uint32(16))).all()
    assert (elementwise(f"fma.rn.{form} d, a, b, c;", np.uint16, a, b, c) == want).all()


def within(got, want, units):
    """No further apart than so many neighbours, 0 and -0 being one; NaN where NaN is wanted."""
    number = ~np.isnan(want)
    sized = [(x.view(np.uint32) & 0x7FFFFFFF).astype(np.int64) for x in (got, want)]
    ordered = [np.where(np.signbit(x), -size, size) for x, size in zip((got, want), sized, strict=True)]
    return (np.isnan(got) == ~number).all() and (np.abs(ordered[0] - ordered[1])[number] <= units).all()


def test_quotient_roots_and_powers():
    a, b = crossed(FLOATS, FLOATS)
    x, y = a.view(np.float32), b.view(np.float32)
    with np.errstate(all="ignore"):
        want = x / y
        assert np.array_equal(elementwise("div.rn.f32 d, a, b;", np.float32, a, b), want, equal_nan=True)
        assert within(elementwise("div.full.f32 d, a, b;", np.float32, a, b), want, 2)
        # beyond 2^126 the approximate quotient is 0, or NaN of an infinity
        far = (np.abs(y) > np.float32(2.0**126)) & np.isfinite(y)
        want = np.where(far, np.where(np.isfinite(x), np.float32(0), np.float32(np.nan)), want)
        assert within(elementwise("div.approx.f32 d, a, b;", np.float32, a, b), want, 2)
    for name, at, value in (
        ("ex2.approx.ftz.f32", 3.0, 8.0), ("lg2.approx.f32", 0.25, -2.0), ("rcp.approx.f32", -4.0, -0.25),
        ("sqrt.approx.f32", 2.25, 1.5), ("rsqrt.approx.f32", 0.25, 2.0), ("tanh.approx.f32", -40.0, -1.0),
        ("ex2.approx.ftz.f32", -127.0, 0.0), ("ex2.approx.f32", -127.0, 2.0**-127), ("lg2.approx.f32", -0.0, -np.inf),
        ("rcp.approx.ftz.f32", 2.0**-127, np.inf), ("rsqrt.approx.f32", -0.0, -np.inf), ("lg2.approx.f32", -1.0, np.nan),
        ("sin.approx.f32", 0.0, 0.0), ("cos.approx.f32", 0.0, 1.0),
    ):  # fmt: skip
        got = elementwise(f"{name} d, a;", np.float32, np.array([at], np.float32))
        assert np.array_equal(got, np.array([value], np.float32), equal_nan=True), name


@pytest.mark.parametrize("modifiers", ("", ".ftz", ".NaN"))
@pytest.mark.parametrize("least", (True, False))
def test_min_max(least, modifiers):
    def order(x):
        if x in ("inf", "-inf"):
            return (Fraction(2) ** 200 if x == "inf" else -(Fraction(2) ** 200), 0)
        return (number(x), -1 if x == "-0" else 0)

    def oracle(a, b):
        if modifiers == ".ftz":
            a, b = flush(a), flush(b)
        if modifiers == ".NaN" and "nan" in (a, b) or a == b == "nan":
            return 0x7FFFFFFF
        rest = [x for x in (a, b) if x != "nan"]
        return to_word((min if least else max)(rest, key=order))

    floats(f"{'min' if least else 'max'}{modifiers}.f32 d, a, b;", oracle, *crossed(FLOATS, FLOATS))


@pytest.mark.parametrize("form", ("f16", "bf16"))
def test_min_max_of_halves(form):
    a = np.array([0x0000, 0x8000, 0x7FFF, 0x3C00, 0x8000], np.uint16)
    b = np.array([0x8000, 0x0000, 0x3C00, 0xBC00, 0x8000], np.uint16)
    assert elementwise(f"min.{form} d, a, b;", np.uint16, a, b).tolist() == [0x8000, 0x8000, 0x3C00, 0xBC00, 0x8000]
    assert elementwise(f"max.{form} d, a, b;", np.uint16, a, b).tolist() == [0, 0, 0x3C00, 0x3C00, 0x8000]
    assert elementwise(f"max.NaN.{form} d, a, b;", np.uint16, a, b).tolist() == [0, 0, 0x7FFF, 0x3C00, 0x8000]


def test_abs_neg():
    a = FLOATS
    assert (elementwise("abs.f32 d, a;", np.uint32, a) & 0x7FFFFFFF == a & 0x7FFFFFFF).all()
    finite = a[(a & 0x7FFFFFFF) < 0x7F800000]
    assert (elementwise("neg.f32 d, a;", np.uint32, finite) == finite ^ 0x80000000).all()
    numbers = a[(a & 0x7FFFFFFF) <= 0x7F800000]
    floats("abs.ftz.f32 d, a;", lambda x: to_word(flush(x)) & 0x7FFFFFFF, numbers)
    floats("neg.ftz.f32 d, a;", lambda x: to_word(flush(x)) ^ 0x80000000, numbers)
    ints("abs.s32 d, a;", lambda a: abs(signed(a)), WORDS)
    ints("neg.s32 d, a;", lambda a: -a, WORDS)
    ints("neg.bf16x2 d, a;", lambda a: a ^ 0x80008000, WORDS[:8])
    ints("abs.f16x2 d, a;", lambda a: a & 0x7FFF7FFF, WORDS[:8])


# Integers


def test_sums_and_products():
    ints("add.s32 d, a, b;", lambda a, b: a + b, WORDS, WORDS)
    ints("sub.u32 d, a, b;", lambda a, b: a - b, WORDS, WORDS)
    ints("add.sat.s32 d, a, b;", lambda a, b: clamp(signed(a) + signed(b)), WORDS, WORDS)
    ints("sub.sat.s32 d, a, b;", lambda a, b: clamp(signed(a) - signed(b)), WORDS, WORDS)
    ints("mul.lo.s32 d, a, b;", lambda a, b: a * b, WORDS, WORDS)
    ints("mul.hi.u32 d, a, b;", lambda a, b: a * b >> 32, WORDS, WORDS)
    ints("mul.hi.s32 d, a, b;", lambda a, b: signed(a) * signed(b) >> 32, WORDS, WORDS)
    ints("mul.hi.u64 d, a, b;", lambda a, b: a * b >> 64, LONG, LONG, dtype=np.uint64, bits=64)
    ints("mul.hi.s64 d, a, b;", lambda a, b: signed(a, 64) * signed(b, 64) >> 64, LONG, LONG, dtype=np.uint64, bits=64)
    ints("mul.wide.u32 d, a, b;", lambda a, b: a * b, WORDS, WORDS, dtype=np.uint64, bits=64)
    ints("mul.wide.s32 d, a, b;", lambda a, b: signed(a) * signed(b), WORDS, WORDS, dtype=np.uint64, bits=64)
    short = WORDS[:14].astype(np.uint16)
    ints("mul.wide.s16 d, a, b;", lambda a, b: signed(a, 16) * signed(b, 16), short, short)
    ints("mul.lo.u16 d, a, b;", lambda a, b: a * b, short, short, dtype=np.uint16, bits=16)
    thirds = LONG[::7]
    wide = lambda a, b, c: signed(a) * signed(b) + c  # noqa: E731
    ints("mad.wide.s32 d, a, b, c;", wide, WORDS[::2], WORDS, thirds, dtype=np.uint64, bits=64)
    ints("mad.lo.s32 d, a, b, c;", lambda a, b, c: a * b + c, WORDS[::2], WORDS, WORDS[::3])
    ints("mad.hi.u32 d, a, b, c;", lambda a, b, c: (a * b >> 32) + c, WORDS[::2], WORDS, WORDS[::3])
    ints("mul.hi.u64 d, 0xFFFFFFFFFFFFFFFF, 16; add.u64 d, d, a;", lambda a: 15 + a, LONG, dtype=np.uint64, bits=64)


def clamp(x, bits=32):
    return max(-(1 << bits - 1), min((1 << bits - 1) - 1, x))


def test_quotients():
    some = WORDS[WORDS != 0]
    toward_zero = lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)  # noqa: E731
    ints("div.u32 d, a, b;", lambda a, b: a // b, WORDS, some)
    ints("rem.u32 d, a, b;", lambda a, b: a % b, WORDS, some)
    ints("div.s32 d, a, b;", lambda a, b: toward_zero(signed(a), signed(b)), WORDS, some)
    ints("rem.s32 d, a, b;", lambda a, b: signed(a) - signed(b) * toward_zero(signed(a), signed(b)), WORDS, some)


def test_extremes_of_integers():
    ints("min.s32 d, a, b;", lambda a, b: min(signed(a), signed(b)), WORDS, WORDS)
    ints("max.u32 d, a, b;", max, WORDS, WORDS)
    ints("max.relu.s32 d, a, b;", lambda a, b: max(signed(a), signed(b), 0), WORDS, WORDS)
    ints("min.u64 d, a, b;", min, LONG, LONG, dtype=np.uint64, bits=64)


SHIFTS = np.array([0, 1, 5, 31, 32, 33, 63, 64, 65, 0x80000000, 0xFFFFFFFF], np.uint32)


def test_shifts():
    short = WORDS[:14].astype(np.uint16)
    ints("shl.b32 d, a, b;", lambda a, n: a << min(n, 64), WORDS, SHIFTS)
    ints("shr.u32 d, a, b;", lambda a, n: a >> min(n, 64), WORDS, SHIFTS)
    ints("shr.b32 d, a, b;", lambda a, n: a >> min(n, 64), WORDS, SHIFTS)
    ints("shr.s32 d, a, b;", lambda a, n: signed(a) >> min(n, 64), WORDS, SHIFTS)
    ints("shl.b64 d, a, b;", lambda a, n: a << min(n, 64), LONG, SHIFTS, dtype=np.uint64, bits=64)
    ints("shr.u64 d, a, b;", lambda a, n: a >> min(n, 64), LONG, SHIFTS, dtype=np.uint64, bits=64)
    ints("shr.s64 d, a, b;", lambda a, n: signed(a, 64) >> min(n, 64), LONG, SHIFTS, dtype=np.uint64, bits=64)
    ints("shl.b16 d, a, b;", lambda a, n: a << min(n, 64), short, SHIFTS, dtype=np.uint16, bits=16)
    ints("shr.s16 d, a, b;", lambda a, n: signed(a, 16) >> min(n, 64), short, SHIFTS, dtype=np.uint16, bits=16)


def test_funnel_shifts():
    left = lambda a, b, n: ((b << 32 | a) << n) >> 32  # noqa: E731
    right = lambda a, b, n: (b << 32 | a) >> n  # noqa: E731
    for way, move in (("l", left), ("r", right)):
        ints(f"shf.{way}.wrap.b32 d, a, b, c;", lambda a, b, n, move=move: move(a, b, n & 31), WORDS, WORDS, SHIFTS)
        ints(
            f"shf.{way}.clamp.b32 d, a, b, c;", lambda a, b, n, move=move: move(a, b, min(n, 32)), WORDS, WORDS, SHIFTS
        )


FIELDS = np.array([0, 1, 5, 8, 31, 32, 33, 63, 64, 255, 256, 0x1FF], np.uint32)


@pytest.mark.parametrize("kind", ("u32", "s32", "u64", "s64"))
def test_bfe(kind):
    bits = int(kind[1:])

    def oracle(a, at, count):
        at, count = at & 255, count & 255
        fill = 0 if kind[0] == "u" or count == 0 else a >> min(at + count - 1, bits - 1) & 1
        taken = [a >> at + n & 1 if n < count and at + n < bits else fill for n in range(bits)]
        return sum(bit << n for n, bit in enumerate(taken))

    words = WORDS if bits == 32 else LONG[::3]
    ints(f"bfe.{kind} d, a, b, c;", oracle, words, FIELDS, FIELDS, dtype=np.dtype(f"u{bits // 8}"), bits=bits)


@pytest.mark.parametrize("bits", (32, 64))
def test_bfi(bits):
    def oracle(a, b, at, count):
        at, count = at & 255, count & 255
        for n in range(count):
            if at + n < bits:
                b = b & ~(1 << at + n) | (a >> n & 1) << at + n
        return b

    words = WORDS[::4] if bits == 32 else LONG[::12]
    ints(
        f"bfi.b{bits} d, a, b, c, e;", oracle, words, words, FIELDS, FIELDS, dtype=np.dtype(f"u{bits // 8}"), bits=bits
    )


def test_prmt():
    def oracle(a, b, selector):
        source = (a | b << 32).to_bytes(8, "little")
        out = []
        for n in range(4):
            nibble = selector >> 4 * n & 15
            byte = source[nibble & 7]
            out.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
        return int.from_bytes(out, "little")

    words = np.array([0x00112233, 0x8899AABB, 0xFF7F8001], np.uint32)
    ints("prmt.b32 d, a, b, c;", oracle, words, words, np.arange(0, 1 << 17, 37, dtype=np.uint32))
    ints("prmt.b32 d, a, 0, 0x3120;", lambda a: oracle(a, 0, 0x3120), words)


def test_lop3():
    a, b, c = 0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA
    each = "".join(f"lop3.b32 %r9, {a}, {b}, {c}, {n};\nst.global.b32 [%rd0+{4 * n}], %r9;\n" for n in range(256))
    got = np.zeros(256, np.uint32)
    launch(kernel(each), got)
    for table in range(256):
        bits = [table >> ((a >> n & 1) << 2 | (b >> n & 1) << 1 | (c >> n & 1)) & 1 for n in range(32)]
        assert int(got[table]) == sum(bit << n for n, bit in enumerate(bits))


def test_counts():
    ints("popc.b32 d, a;", lambda a: bin(a).count("1"), WORDS)
    ints("popc.b64 d, a;", lambda a: bin(a).count("1"), LONG)
    ints("clz.b32 d, a;", lambda a: 32 - a.bit_length(), WORDS)
    ints("clz.b64 d, a;", lambda a: 64 - a.bit_length(), LONG)
    ints("brev.b32 d, a;", lambda a: int(f"{a:032b}"[::-1], 2), WORDS)
    ints("bfind.u32 d, a;", lambda a: a.bit_length() - 1, WORDS)
    ints("bfind.shiftamt.u32 d, a;", lambda a: 32 - a.bit_length() if a else -1, WORDS)
    ints("bfind.s32 d, a;", lambda a: (a if a >> 31 == 0 else ~a & 0xFFFFFFFF).bit_length() - 1, WORDS)
    ints("not.b32 d, a;", lambda a: ~a, WORDS)
    ints("cnot.b32 d, a;", lambda a: int(a == 0), WORDS)
    ints("and.b32 d, a, b; xor.b32 d, d, b; or.b32 d, d, a;", lambda a, b: (a & b ^ b) | a, WORDS, WORDS)


# Comparisons


def test_setp_of_integers():
    for name, kind, held in (
        ("lt", "s32", lambda a, b: signed(a) < signed(b)), ("lt", "u32", lambda a, b: a < b),
        ("lo", "u32", lambda a, b: a < b), ("hs", "u32", lambda a, b: a >= b), ("ls", "u32", lambda a, b: a <= b),
        ("hi", "u32", lambda a, b: a > b), ("ge", "s32", lambda a, b: signed(a) >= signed(b)),
        ("eq", "b32", lambda a, b: a == b), ("ne", "s32", lambda a, b: a != b),
    ):  # fmt: skip
        ints(
            f"setp.{name}.{kind} %p1, a, b; selp.b32 d, 1, 0, %p1;",
            lambda a, b, held=held: int(held(a, b)),
            WORDS,
            WORDS,
        )


def test_setp_with_another_predicate():
    """d's first bit from p, its second from q, which is of the comparison's complement; the third predicate may be p itself."""
    text = (
        "setp.ne.u32 %p1, c, 0; mov.pred %p3, %p1; setp.{} %p1|%p2, a, b, {};"
        "selp.b32 d, 1, 0, %p1; selp.b32 %r9, 2, 0, %p2; or.b32 d, d, %r9;"
    )
    for join, combine in (("and", lambda x, y: x and y), ("or", lambda x, y: x or y), ("xor", lambda x, y: x != y)):
        for third, flip in (("%p3", False), ("%p1", False), ("!%p3", True)):
            ints(
                text.format(f"lt.{join}.s32", third),
                lambda a, b, c, f=combine, flip=flip: (
                    int(f(signed(a) < signed(b), (c != 0) != flip)) | 2 * int(f(signed(a) >= signed(b), (c != 0) != flip))
                ),
                WORDS, WORDS[::3], WORDS[:2],
            )  # fmt: skip


def test_setp_of_floats():
    def order(x):
        return {"inf": Fraction(2) ** 200, "-inf": -(Fraction(2) ** 200), "-0": Fraction(0)}.get(x, x)

    ways = {
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
        "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    }  # fmt: skip
    pairs = crossed(FLOATS[:-2], FLOATS[::2])
    for name, way in ways.items():
        for unordered in (False, True):
            for ftz in (False, True):

                def oracle(a, b, way=way, unordered=unordered, ftz=ftz):
                    if "nan" in (a, b):
                        return int(unordered)
                    if ftz:
                        a, b = flush(a), flush(b)
                    return int(way(order(a), order(b)))

                text = f"setp.{name}{'u' * unordered}{'.ftz' * ftz}.f32 %p1, a, b; selp.b32 d, 1, 0, %p1;"
                floats(text, oracle, *pairs)
    floats("setp.num.f32 %p1, a, b; selp.b32 d, 1, 0, %p1;", lambda a, b: int("nan" not in (a, b)), *pairs)
    floats("setp.nan.f32 %p1, a, b; selp.b32 d, 1, 0, %p1;", lambda a, b: int("nan" in (a, b)), *pairs)


# Conversions

EVERY_HALF = np.arange(1 << 16, dtype=np.uint32)


def half_words():
    """fp32 around every bf16, every fp16: the value itself, the middle between it and the next, and both sides of that."""
    coarse = EVERY_HALF << np.uint32(16)
    around = [coarse + np.uint32(x) for x in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    halves = EVERY_HALF.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    around += [halves + np.uint32(x) for x in (0, 1, 0xFFF, 0x1000, 0x1001)]
    return np.concatenate(around)


@pytest.mark.parametrize("form", ("bf16", "f16"))
def test_cvt_to_halves(form):
    words = half_words()[::3]
    x = torch.from_numpy(words.view(np.float32).copy())
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[form]
    want = x.to(dtype).view(torch.int16).numpy().view(np.uint16)
    want = np.where(np.isnan(x.numpy()), np.uint16(0x7FFF), want)
    assert (elementwise(f"cvt.rn.{form}.f32 d, a;", np.uint16, words) == want).all()
    got = elementwise(f"cvt.rn.{form}x2.f32 d, a, b;", np.uint32, words, np.roll(words, 1))
    assert (got == (want.astype(np.uint32) << np.uint32(16) | np.roll(want, 1))).all()
    zero = np.where(x.numpy() < 0, np.uint16(0), want)
    got = elementwise(f"cvt.rn.relu.{form}x2.f32 d, a, a;", np.uint32, words)
    assert (got & 0x7FFF == (zero & 0x7FFF)).all() and (got >> 16 & 0x7FFF == (zero & 0x7FFF)).all()


def test_cvt_toward_zero():
    finite = half_words()[::53]
    finite = finite[(finite & 0x7F800000) != 0x7F800000]
    assert (elementwise("cvt.rz.bf16.f32 d, a;", np.uint16, finite) == finite >> 16).all()
    got = elementwise("cvt.rz.f16.f32 d, a;", np.uint16, finite)
    want = [to_word(fraction(int(w)), "rz", fraction_bits=10, exponent_bits=5) for w in finite]
    want = np.array([w if w < 1 << 16 else 0x8000 for w in want], np.uint16)
    assert (got == want).all()


def test_cvt_from_halves():
    words = EVERY_HALF.astype(np.uint16)
    for form, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        want = torch.from_numpy(words.copy()).view(dtype).float().numpy()
        assert np.array_equal(elementwise(f"cvt.f32.{form} d, a;", np.float32, words), want, equal_nan=True)


@pytest.mark.parametrize(("form", "dtype"), (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)))
def test_cvt_to_fp8(form, dtype):
    """Ties between any two neighbours, and what lies beyond: torch's cast of what is clamped before."""
    words = half_words()[::7]
    x = torch.from_numpy(words.view(np.float32).copy())
    limit = torch.finfo(dtype).max
    want = x.clamp(-limit, limit).to(dtype).view(torch.uint8).numpy()
    want = np.where(np.isnan(x.numpy()), np.uint8(0x7F), want)
    got = elementwise(f"cvt.rn.satfinite.{form}x2.f32 d, a, b;", np.uint16, words, np.roll(words, 1))
    assert (got == (want.astype(np.uint16) << np.uint16(8) | np.roll(want, 1))).all()
    codes = EVERY_HALF.astype(np.uint16)
    values = (
        torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float16).view(torch.int16).numpy().view(np.uint16)
    )
    got = elementwise(f"cvt.rn.f16x2.{form}x2 d, a;", np.uint32, codes)
    low, high = got & 0xFFFF, got >> 16
    for half, code in ((low, codes & 255), (high, codes >> 8)):
        nan = np.isnan(values.view(np.float16))[code]
        assert (half[~nan] == values[code][~nan]).all() and (half[nan] == 0x7FFF).all()


def test_cvt_to_fp4():
    """A table of intervals: ties go to the code whose last bit is 0."""
    ends = [
        0.25,
        0.75,
        1.25,
        1.75,
        2.5,
        3.5,
        5.0,
    ]  # between neighbours; a tie belongs below where the code below is even
    more = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, 7, 1e30, np.inf, 1e-40, 5.9999995])
    above, below = (np.nextafter(np.float32(ends), np.float32(way)) for way in (9, -9))
    x = np.concatenate([np.float32(ends), above, below, more])
    x = np.concatenate([x, -x, np.float32([np.nan])])
    want = []
    for value in x:
        code = sum(abs(value) > end or abs(value) == end and n % 2 == 1 for n, end in enumerate(ends))
        want.append(7 if np.isnan(value) else code | 8 * int(np.signbit(value)))
    want = np.array(want, np.uint16)
    text = ".reg .b8 q;\ncvt.rn.satfinite.e2m1x2.f32 q, a, b;\ncvt.u16.u8 d, q;"
    got = elementwise(text, np.uint16, x, np.roll(x, 1), arch="100a")
    assert (got == (want << np.uint16(4) | np.roll(want, 1))).all()
    values = np.float16([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]).view(np.uint16)
    codes = np.arange(256, dtype=np.uint16)
    got = elementwise(".reg .b8 q;\ncvt.u8.u16 q, a;\ncvt.rn.f16x2.e2m1x2 d, q;", np.uint32, codes, arch="100a")
    assert (got == (values[codes & 15] | values[codes >> 4].astype(np.uint32) << np.uint32(16))).all()


def test_cvt_to_fp4_by_random_bits(monkeypatch):
    """Fractions of a step, 0, 1, 128 and 255.9 of 256, each with bytes of random bits that carry and that do not quite."""
    monkeypatch.setattr(conversions, "RANDOM_BITS", [range(8 * n + 7, 8 * n - 1, -1) for n in (3, 2, 1, 0)])
    grid = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]
    x, r, want = [], [], []
    for code, (low, high) in enumerate(itertools.pairwise(grid)):
        for part, needs in ((0, 256), (1, 255), (128, 128), (Fraction(2559, 10), 1)):
            for byte in {0, min(needs, 255), max(needs - 1, 0)}:
                x.append(float(low + (high - low) * part / 256))
                r.append(byte)
                want.append(code + (byte >= needs))
    x, r, want = (np.array(column) for column in (x + [6, 1e30, math.inf], r + [255] * 3, want + [7] * 3))
    x, r, want = np.float32([*x, *-x, math.nan]), np.uint32([*r, *r, 0]), np.uint16([*want, *want + 8, 7])
    words = sum(np.roll(r, n) << np.uint32(8 * (3 - n)) for n in range(4))
    text = "cvt.rs.satfinite.e2m1x4.f32 d, {a, b, c, e}, f;"
    got = elementwise(text, np.uint16, *(np.roll(x, n) for n in range(4)), words, arch="100a")
    assert (got == sum(np.roll(want, n) << np.uint16(4 * (3 - n)) for n in range(4))).all()


def test_cvt_to_tf32():
    words = half_words()[::9]
    words = words[(words & 0x7F800000) != 0x7F800000]
    away = (words.astype(np.uint64) + 0x1000 & 0xFFFFE000).astype(np.uint32)
    assert (elementwise("cvt.rna.tf32.f32 d, a;", np.uint32, words) & 0xFFFFE000 == away).all()


def test_cvt_of_integers():
    for to, source, oracle in (
        ("s32", "s8", lambda a: signed(a, 8)), ("u32", "u8", lambda a: a & 255), ("s32", "s16", lambda a: signed(a, 16)),
        ("u32", "u16", lambda a: a & 0xFFFF),
    ):  # fmt: skip
        ints(f"cvt.u16.u32 %h1, a; cvt.{to}.{source} d, %h1;", oracle, WORDS)
    ints("cvt.s64.s32 d, a;", signed, WORDS, dtype=np.uint64, bits=64)
    ints("cvt.u64.u32 d, a;", lambda a: a, WORDS, dtype=np.uint64, bits=64)
    ints("cvt.u32.u64 d, a;", lambda a: a, LONG)
    ints("cvt.sat.s32.s64 d, a;", lambda a: clamp(signed(a, 64)), LONG)
    ints("cvt.sat.u32.s64 d, a;", lambda a: max(0, min(signed(a, 64), (1 << 32) - 1)), LONG)
    ints("cvt.s8.s32 %h1, a; cvt.s32.s16 d, %h1;", lambda a: signed(a, 8), WORDS)  # the wider register has the sign
    floats_of = {"s32": signed, "u32": int}
    for source, value in floats_of.items():
        for mode in ("rn", "rz"):
            ints(f"cvt.{mode}.f32.{source} d, a;", lambda a, v=value, m=mode: to_word(Fraction(v(a)), m), WORDS)
    ints("cvt.rn.f32.s64 d, a;", lambda a: to_word(Fraction(signed(a, 64))), LONG)
    ints("cvt.rn.f32.u64 d, a;", lambda a: to_word(Fraction(a)), LONG)


@pytest.mark.parametrize("mode", ("rni", "rzi", "rmi", "rpi"))
def test_cvt_to_integers(mode):
    """What lies beyond the type becomes its limit; NaN 0, or of 64 bits the highest bit alone."""
    x = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999997, 1e10, -1e10, 2147483648.0, -2147483648.0, 4294967296.0,
                    np.inf, -np.inf, np.nan, -0.0, 1e-40, 8388607.5])  # fmt: skip
    whole = {"rni": round, "rzi": lambda v: int(v), "rmi": np.floor, "rpi": np.ceil}[mode]

    def oracle(value, low, high, nan=0):
        if np.isnan(value):
            return nan
        return (low if value < 0 else high) if np.isinf(value) else max(low, min(high, int(whole(float(value)))))

    got = elementwise(f"cvt.{mode}.s32.f32 d, a;", np.int32, x)
    assert got.tolist() == [oracle(v, -(1 << 31), (1 << 31) - 1) for v in x]
    got = elementwise(f"cvt.{mode}.u32.f32 d, a;", np.uint32, x)
    assert got.tolist() == [oracle(v, 0, (1 << 32) - 1) for v in x]
    got = elementwise(f"cvt.{mode}.s64.f32 d, a;", np.int64, x)
    assert got.tolist() == [oracle(v, -(1 << 63), (1 << 63) - 1, -(1 << 63)) for v in x]
    finite = x[np.isfinite(x)]
    got = elementwise(f"cvt.{mode}.f32.f32 d, a;", np.float32, finite)
    assert got.tolist() == [float(whole(float(v))) for v in finite]


def test_words_and_their_parts():
    text = "mov.b32 {%h1, %h2}, a; mov.b32 d, {%h2, %h1};"
    ints(text, lambda a: a >> 16 | a << 16, WORDS)
    ints("mov.b64 {%r8, %r9}, a; mov.b64 d, {%r9, %r8};", lambda a: a >> 32 | a << 32, LONG, dtype=np.uint64, bits=64)
    ints("mov.b32 d, 0f3F800000; add.u32 d, d, a;", lambda a: 0x3F800000 + a, WORDS)
    ints("selp.f32 d, 0f40000000, a, %p0;", lambda a: a, WORDS)


def test_what_is_not_modelled_is_named():
    for text in (
        "add.cc.u32 d, a, b;", "fma.rn.relu.f16x2 d, a, b, a;", "min.xorsign.abs.f32 d, a, b;",
        "prmt.b32.f4e d, a, b, a;", "setp.lt.ftz.f16x2 %p1|%p2, a, b;", "dp4a.u32.u32 d, a, b, a;",
        "mad.hi.sat.s32 d, a, b, a;", "tanh.approx.f16x2 d, a;",
    ):  # fmt: skip
        with pytest.raises(Fault, match=text.split()[0].replace(".", r"\.")):
            elementwise(text, np.uint32, WORDS, WORDS)


def test_fp32_of_fp64_constants():
    assert list(
        itertools.islice(elementwise("add.f32 d, a, 0d3FF0000000000000;", np.float32, np.float32([1, 2])), 2)
    ) == [2, 3]
