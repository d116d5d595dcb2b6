"""Arithmetic, comparisons and bits (PTX ISA, "Integer Arithmetic Instructions" to "Logic and Shift Instructions")."""

import numpy as np

from tests.machine.machine import TYPES, instruction
from tests.machine.rounding import fused, odd_sum, to_f32, values16, words16


def kind_of(i):
    """The type that an instruction computes in, the last of its modifiers."""
    return i.parts[-1]


def unary(machine, i, compute):
    return nary(machine, i, compute, [kind_of(i)])


def nary(machine, i, compute, kinds):
    reads = [machine.reader(operand, kind) for operand, kind in zip(i.operands[1:], kinds, strict=True)]
    write = machine.writer(i.operands[0])
    return lambda mask: write(compute(*(read() for read in reads)), mask)


def is_float(kind):
    return kind in ("f32", "f64")


def flushed(x):
    """Subnormal fp32 as zero of the same sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


NAN = np.uint32(0x7FFFFFFF).view(np.float32)


def one_nan(x):
    """Every NaN that fp32 arithmetic gives is the same: no payload survives (PTX ISA, "Floating Point Instructions")."""
    bad = np.isnan(x)
    return np.where(bad, NAN, x) if bad.any() else x


def with_modifiers(i, compute):
    """Of fp32: .ftz, which flushes what comes and what is given, and .sat, whose zero has no sign and NaN is zero."""
    if "sat" in i.parts:
        inner = lambda *given: np.fmin(np.fmax(compute(*given), np.float32(0)) + np.float32(0), np.float32(1))  # noqa: E731
    else:
        inner = lambda *given: one_nan(compute(*given))  # noqa: E731
    if "ftz" in i.parts:
        return lambda *given: flushed(inner(*map(flushed, given)))
    return inner


def mode(i):
    """How an instruction rounds."""
    return next((m for m in ("rn", "rz", "rm", "rp") if m in i.parts), "rn")


def packed(kind):
    return kind in ("f16x2", "bf16x2", "f16", "bf16")


def on_halves(kind, compute):
    """Arithmetic in fp64 on one or two halves of a word, rounded once."""
    form = kind.removesuffix("x2")

    def run(*words):
        low = words16(compute(*(values16(np.asarray(w).astype(np.uint16), form) for w in words)), form)
        if not kind.endswith("x2"):
            return low
        high = words16(
            compute(*(values16((np.asarray(w) >> np.uint32(16)).astype(np.uint16), form) for w in words)), form
        )
        return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)

    return run


def pairs(kind, compute):
    """Two integers of 16 bits in a word, or two fp32 in a double word, each by itself ("s16x2", "f32x2")."""
    one, word = TYPES[kind.removesuffix("x2")], TYPES[kind]

    def run(*words):
        both = [np.asarray(w, word)[..., None].view(one) for w in words]
        result = [np.asarray(compute(*(part[..., k] for part in both)), one) for k in (0, 1)]
        return np.ascontiguousarray(np.stack(np.broadcast_arrays(*result), -1)).view(word)[..., 0]

    return run


def in_pairs(kind):
    return kind in ("s16x2", "u16x2", "f32x2")


def allowed(i, *modifiers):
    """Fault on a modifier that is not among these: what stands between the name and the type."""
    if unknown := set(i.parts[1:-1]) - set(modifiers):
        raise KeyError(f"{i.name}: {', '.join(sorted(unknown))}")


def zero_down(i, a, b, total):
    """a + b, which is -0 and not 0 of numbers that cancel where it is rounded down (IEEE 754)."""
    if mode(i) != "rm":
        return total
    return np.where((total == 0) & (np.signbit(a) != np.signbit(b)), -0.0, total)


def mixed(machine, i):
    """add, sub and fma of fp32 whose first operands, all but the last, are halves ("Mixed Precision Floating-Point")."""
    kind, negative = kind_of(i), i.name.startswith("sub")
    allowed(i, "rn", "rz", "rm", "rp", "f32")
    if kind not in ("f16", "bf16"):
        raise KeyError(i.name)
    ones = np.float64(1) if len(i.operands) == 3 else None  # a + c is a times 1 + c

    def compute(a, *rest):
        b, c = (ones, rest[0]) if ones is not None else (values16(rest[0], kind), rest[1])
        return to_f32(fused(values16(a, kind), b, (-c if negative else c).astype(np.float64)), mode(i))

    return nary(machine, i, compute, [kind] * (len(i.operands) - 2) + ["f32"])


@instruction("add", "sub")
def add(machine, i):
    if "f32" in i.parts[1:-1]:
        return mixed(machine, i)
    kind, negative = kind_of(i), i.name.startswith("sub")
    if in_pairs(kind):
        allowed(i, *(["rn", "ftz"] if kind == "f32x2" else []))
        plain = (lambda a, b: a - b) if negative else (lambda a, b: a + b)
        return nary(machine, i, pairs(kind, with_modifiers(i, plain) if kind == "f32x2" else plain), [kind] * 2)
    if kind == "s32" and i.parts[1:-1] == ["sat"]:
        whole = lambda a, b: a.astype(np.int64) - b if negative else a.astype(np.int64) + b  # noqa: E731
        limited = lambda a, b: np.clip(whole(a, b), -(1 << 31), (1 << 31) - 1).astype(np.int32)  # noqa: E731
        return nary(machine, i, limited, [kind] * 2)
    allowed(
        i, *{"f32": ["rn", "rz", "rm", "rp", "ftz", "sat"], "f64": ["rn"]}.get(kind, ["rn"] if packed(kind) else [])
    )
    if packed(kind):
        plain = on_halves(kind, (lambda a, b: odd_sum(a, -b)) if negative else odd_sum)
        return nary(machine, i, plain, [kind] * 2)
    if kind == "f32" and mode(i) != "rn":

        def exact(a, b):
            a, b = a.astype(np.float64), (-b if negative else b).astype(np.float64)
            return to_f32(zero_down(i, a, b, odd_sum(a, b)), mode(i))

        return nary(machine, i, with_modifiers(i, exact), [kind] * 2)
    compute = (lambda a, b: a - b) if negative else (lambda a, b: a + b)
    return nary(machine, i, with_modifiers(i, compute) if kind == "f32" else compute, [kind] * 2)


def wide(kind):
    return TYPES[kind[0] + str(2 * int(kind[1:]))]


def high(a, b, kind):
    bits = int(kind[1:])
    if bits < 64:
        whole = wide(kind)
        return (a.astype(whole) * b.astype(whole) >> whole(bits)).astype(TYPES[kind])
    product = np.asarray(a).astype(object) * np.asarray(b).astype(object) >> 64
    return np.asarray(product).astype(TYPES[kind])


def product(i, kind):
    if "wide" in i.parts:
        return lambda a, b: np.asarray(a).astype(wide(kind)) * np.asarray(b).astype(wide(kind))
    if "hi" in i.parts:
        return lambda a, b: high(np.asarray(a), np.asarray(b), kind)
    if "lo" in i.parts:
        return lambda a, b: a * b
    raise KeyError(i.name)


@instruction("mul")
def mul(machine, i):
    kind = kind_of(i)
    if kind == "f32x2":
        allowed(i, "rn", "ftz")
        return nary(machine, i, pairs(kind, with_modifiers(i, lambda a, b: a * b)), [kind] * 2)
    allowed(
        i,
        *(
            ["rn"]
            if packed(kind)
            else ["rn", "rz", "rm", "rp", "ftz", "sat"]
            if is_float(kind)
            else ["lo", "hi", "wide"]
        ),
    )
    if packed(kind):
        return nary(machine, i, on_halves(kind, lambda a, b: a * b), [kind] * 2)
    if is_float(kind):
        if mode(i) != "rn":
            exact = lambda a, b: to_f32(a.astype(np.float64) * b.astype(np.float64), mode(i))  # noqa: E731
            return nary(machine, i, with_modifiers(i, exact), [kind] * 2)
        plain = lambda a, b: a * b  # noqa: E731
        return nary(machine, i, with_modifiers(i, plain) if kind == "f32" else plain, [kind] * 2)
    return nary(machine, i, product(i, kind), [kind] * 2)


@instruction("mad")
def mad(machine, i):
    kind = kind_of(i)
    if is_float(kind):
        return fma(machine, i)
    allowed(i, "lo", "hi", "wide")
    multiply = product(i, kind)
    third = kind[0] + str(2 * int(kind[1:])) if "wide" in i.parts else kind
    return nary(machine, i, lambda a, b, c: multiply(a, b) + c, [kind, kind, third])


@instruction("fma")
def fma(machine, i):
    if "f32" in i.parts[1:-1]:
        return mixed(machine, i)
    kind = kind_of(i)
    if packed(kind):
        allowed(i, "rn")
        return nary(machine, i, on_halves(kind, fused), [kind] * 3)
    if kind == "f32x2":
        allowed(i, "rn", "ftz")
        once = with_modifiers(i, lambda a, b, c: to_f32(fused(a, b, c)))
        return nary(machine, i, pairs(kind, once), [kind] * 3)
    if kind != "f32":
        raise KeyError(kind)
    allowed(i, "rn", "rz", "rm", "rp", "ftz", "sat")

    def compute(a, b, c):
        return to_f32(zero_down(i, np.asarray(a, np.float64) * b, c, fused(a, b, c)), mode(i))

    return nary(machine, i, with_modifiers(i, compute), [kind] * 3)


@instruction("div")
def div(machine, i):
    kind = kind_of(i)
    allowed(i, *{"f32": ["rn", "full", "approx", "ftz"], "f64": ["rn"]}.get(kind, []))
    if is_float(kind):
        if "rn" in i.parts:
            compute = lambda a, b: a / b  # noqa: E731
        elif kind == "f32" and {"full", "approx"} & set(i.parts):
            compute = quotient(small="approx" in i.parts)
        else:
            raise KeyError(i.name)
        return nary(machine, i, with_modifiers(i, compute) if kind == "f32" else compute, [kind] * 2)
    return nary(machine, i, lambda a, b: truncated(a, b)[0], [kind] * 2)


def quotient(small):
    """Of two fp32 to within a few units, as all approximations; small: with div.approx's bounds on the divisor."""

    def compute(a, b):
        wide = np.asarray(a, np.float64) / np.asarray(b, np.float64)
        result = nudged(wide)
        if small:
            beyond = np.abs(b) > np.float32(2.0**126)
            lost = np.where(np.isfinite(a), np.copysign(np.float32(0), result), np.float32(np.nan))
            result = np.where(beyond & np.isfinite(b), lost, result)
        return result

    return compute


@instruction("rem")
def rem(machine, i):
    return nary(machine, i, lambda a, b: truncated(a, b)[1], [kind_of(i)] * 2)


def truncated(a, b):
    """Quotient toward zero and remainder; of a division by zero anything."""
    b = np.where(b == 0, b.dtype.type(1), b)
    if np.issubdtype(b.dtype, np.unsignedinteger):
        return a // b, a % b
    quotient = a // b
    quotient = quotient + ((quotient < 0) & (quotient * b != a)).astype(b.dtype)
    return quotient, a - quotient * b


@instruction("abs", "neg")
def sign(machine, i):
    kind, negative = kind_of(i), i.name.startswith("neg")
    allowed(i, *["ftz"] * (kind == "f32"))
    if packed(kind):
        bits = np.uint32(0x80008000) if kind.endswith("x2") else np.uint16(0x8000)
        return unary(machine, i, (lambda a: a ^ bits) if negative else (lambda a: a & ~bits))
    compute = (lambda a: -a) if negative else np.abs
    return unary(machine, i, (lambda a: compute(flushed(a))) if "ftz" in i.parts else compute)


def extreme_of(least, with_nan):
    """The smaller or larger of two: NaN gives way to a number, or to nothing with .NaN; -0 is below 0."""
    pick = (np.minimum if least else np.maximum) if with_nan else (np.fmin if least else np.fmax)

    def compute(a, b):
        signs = np.signbit(a) | np.signbit(b) if least else np.signbit(a) & np.signbit(b)
        return np.where((a == 0) & (b == 0), np.where(signs, a.dtype.type(-0.0), a.dtype.type(0)), pick(a, b))

    return compute


@instruction("min", "max")
def extreme(machine, i):
    kind, least = kind_of(i), i.name.startswith("min")
    if kind in ("s16x2", "u16x2"):
        allowed(i, "relu")
        pick = np.minimum if least else np.maximum
        clipped = (lambda a, b: np.maximum(pick(a, b), a.dtype.type(0))) if "relu" in i.parts else pick
        return nary(machine, i, pairs(kind, clipped), [kind] * 2)
    if packed(kind):
        allowed(i, "NaN")
        return nary(machine, i, on_halves(kind, extreme_of(least, "NaN" in i.parts)), [kind] * 2)
    if is_float(kind):
        allowed(i, "NaN", "ftz")
        of_two = extreme_of(least, "NaN" in i.parts)

        def compute(*given):
            a, b, *others = given
            plain = of_two(a, b)
            return compute(plain, *others) if others else plain

        return nary(
            machine, i, with_modifiers(i, compute) if kind == "f32" else compute, [kind] * (len(i.operands) - 1)
        )
    allowed(i, *["relu"] * (kind == "s32"))
    pick = np.minimum if least else np.maximum
    compute = (lambda a, b: np.maximum(pick(a, b), 0).astype(a.dtype)) if "relu" in i.parts else pick
    return nary(machine, i, compute, [kind] * 2)


def nudged(x):
    """fp64 as an approximation in fp32 that has it: where fp32 does not hold x, one of its neighbours, or the next beyond. What
    is exact stays exact, as chips have it. No kernel may depend on more (PTX ISA: 2 units for div.full, 1 for rcp.approx, a
    relative error of 2^-22 and so on for the others)."""
    nearest = np.asarray(x).astype(np.float32)
    bits = nearest.view(np.uint32)
    apart = (bits * np.uint32(0x9E3779B1) >> np.uint32(30)).astype(np.int64) - 1  # -1, 0, 1, 2: of some bits of it
    step = np.where(apart == 2, 0, apart)
    moved = (bits.astype(np.int64) + step).astype(np.uint32).view(np.float32)
    moves = (nearest.astype(np.float64) != x) & np.isfinite(nearest) & (nearest != 0) & np.isfinite(moved)
    return np.where(moves, moved, nearest)


def approximate(double):
    return lambda x: nudged(double(np.asarray(x).astype(np.float64)))


def exactly(double):
    """In fp64, then rounded once: of a square root and a reciprocal that is the one rounding there is."""
    return lambda x: np.asarray(double(np.asarray(x).astype(np.float64))).astype(np.float32)


FUNCTIONS = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1 / x, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip


@instruction(*FUNCTIONS)
def function(machine, i):
    name, kind = i.parts[0], kind_of(i)
    if kind != "f32":
        raise KeyError(i.name)
    allowed(i, "approx", "ftz", "rn")
    if "rn" in i.parts and name not in ("rcp", "sqrt"):
        raise KeyError(i.name)
    return unary(machine, i, with_modifiers(i, (exactly if "rn" in i.parts else approximate)(FUNCTIONS[name])))


@instruction("and", "or", "xor")
def logic(machine, i):
    allowed(i)
    compute = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[i.parts[0]]
    return nary(machine, i, compute, [kind_of(i)] * 2)


@instruction("not", "cnot")
def invert(machine, i):
    if i.parts[0] == "cnot":
        return unary(machine, i, lambda a: (a == 0).astype(a.dtype))
    return unary(machine, i, lambda a: ~a)


@instruction("shl", "shr")
def shift(machine, i):
    kind = kind_of(i)
    bits = int(kind[1:])
    left = i.parts[0] == "shl"
    allowed(i)

    def compute(a, n):
        """What is shifted by all bits or more is gone; of a signed number the sign stays."""
        a = np.asarray(a)
        if a.dtype.kind == "i":
            return a >> np.minimum(n, bits - 1).astype(a.dtype)
        by = np.minimum(n, bits - 1).astype(a.dtype)
        return np.where(n >= bits, a.dtype.type(0), a << by if left else a >> by)

    return nary(machine, i, compute, [kind, "u32"])


@instruction("shf")
def funnel(machine, i):
    left, wraps = i.parts[1] == "l", "wrap" in i.parts

    def compute(a, b, n):
        n = n & 31 if wraps else np.minimum(n, 32)
        both = np.asarray(b).astype(np.uint64) << np.uint64(32) | a
        n = n.astype(np.uint64)
        moved = (both << n) >> np.uint64(32) if left else both >> n
        return moved.astype(np.uint32)

    return nary(machine, i, compute, ["u32"] * 3)


@instruction("bfe")
def extract(machine, i):
    kind = kind_of(i)
    bits = int(kind[1:])

    def compute(a, at, count):
        """Beyond the word an unsigned field is zero, a signed one the sign of the field, or of the word."""
        at, count = np.asarray(at & 255).astype(np.int64), np.asarray(count & 255).astype(np.int64)
        word = (
            np.asarray(a).astype(np.uint64)
            if bits == 64
            else np.asarray(a).astype(np.int64).astype(np.uint64) & np.uint64((1 << 32) - 1)
        )
        field_bits = np.minimum(count, np.maximum(bits - at, 0))
        field = np.where(at >= bits, np.uint64(0), word >> np.minimum(at, bits - 1).astype(np.uint64))
        keep = np.where(
            field_bits >= 64,
            ~np.uint64(0),
            (np.uint64(1) << np.minimum(field_bits, 63).astype(np.uint64)) - np.uint64(1),
        )
        field = field & keep
        if kind[0] == "s":
            last = np.minimum(at + count - 1, bits - 1)
            negative = (word >> np.maximum(last, 0).astype(np.uint64) & np.uint64(1) != 0) & (count > 0)
            field = np.where(negative, field | ~keep, field)
        return field.astype(f"u{bits // 8}").view(TYPES[kind])

    return nary(machine, i, compute, [kind, "u32", "u32"])


@instruction("bfi")
def insert(machine, i):
    kind = kind_of(i)
    word = TYPES["u" + kind[1:]]
    bits = int(kind[1:])

    def compute(a, b, at, count):
        at, count = np.minimum(at & 255, bits).astype(np.int64), np.minimum(count & 255, bits).astype(np.int64)
        ones = np.where(count >= bits, ~word(0), (word(1) << np.minimum(count, bits - 1).astype(word)) - word(1))
        place = np.minimum(at, bits - 1).astype(word)
        mask = np.where(at >= bits, word(0), ones << place)
        return (b & ~mask) | (a << place) & mask

    return nary(machine, i, compute, [kind, kind, "u32", "u32"])


@instruction("popc", "clz", "brev", "bfind")
def counted(machine, i):
    allowed(i, *["shiftamt"] * (i.parts[0] == "bfind"))
    kind = kind_of(i)
    bits = int(kind[1:])

    def as_bits(a):
        return np.asarray(a).view(TYPES["u" + kind[1:]])[..., None] >> np.arange(bits, dtype=TYPES["u" + kind[1:]]) & 1

    def compute(a):
        if kind[0] == "s":  # the first bit that is not the sign's
            a = np.where(a < 0, ~a, a)
        ones = as_bits(a)
        if i.parts[0] == "popc":
            return ones.sum(-1).astype(np.uint32)
        highest = np.where(ones.any(-1), bits - 1 - ones[..., ::-1].argmax(-1), -1)
        if i.parts[0] == "clz":
            return (bits - 1 - highest).astype(np.uint32)
        if i.parts[0] == "bfind":
            shift = "shiftamt" in i.parts
            return np.where(shift & (highest >= 0), bits - 1 - highest, highest).astype(np.int64).astype(np.uint32)
        if i.parts[0] == "brev":
            places = np.arange(bits, dtype=TYPES["u" + kind[1:]])[::-1]
            return (ones << places).sum(-1).astype(TYPES["u" + kind[1:]])
        raise KeyError(i.name)

    return unary(machine, i, compute)


@instruction("lop3")
def lop3(machine, i):
    table = i.operands[4].value

    def compute(a, b, c):
        out = np.zeros((), np.uint32)
        for row in range(8):
            if table >> row & 1:
                term = ~np.uint32(0)
                for word, bit in ((a, row >> 2), (b, row >> 1), (c, row)):
                    term = term & (word if bit & 1 else ~word)
                out = out | term
        return out

    i.operands = i.operands[:4]
    return nary(machine, i, compute, ["b32"] * 3)


@instruction("prmt")
def prmt(machine, i):
    if len(i.parts) > 2:
        raise KeyError(i.name)

    def compute(a, b, selector):
        both = np.asarray(b).astype(np.uint64) << np.uint64(32) | a
        out = np.zeros((), np.uint32)
        for k in range(4):
            pick = np.asarray(selector >> np.uint32(4 * k) & np.uint32(15)).astype(np.uint64)
            byte = both >> (np.uint64(8) * (pick & np.uint64(7))) & np.uint64(255)
            byte = np.where(pick & np.uint64(8) != 0, np.where(byte & np.uint64(128) != 0, 255, 0), byte)
            out = out | byte.astype(np.uint32) << np.uint32(8 * k)
        return out

    return nary(machine, i, compute, ["b32"] * 3)


COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}


@instruction("setp")
def setp(machine, i):
    name, kind = i.parts[1], kind_of(i)
    if kind not in TYPES or kind in ("s16x2", "u16x2", "f32x2"):
        raise KeyError(i.name)
    allowed(i, name, "and", "or", "xor", *["ftz"] * (kind == "f32"))
    form = kind.removesuffix("x2") if packed(kind) else None

    def compare(a, b):
        if name in ("nan", "num"):
            found = np.isnan(a) | np.isnan(b)
            return found if name == "nan" else ~found
        if name in UNORDERED:
            return COMPARE[UNORDERED[name]](a, b) | np.isnan(a) | np.isnan(b)
        held = COMPARE[name](a, b)
        if (is_float(kind) or form) and name == "ne":
            held = held & ~(np.isnan(a) | np.isnan(b))
        return held

    join = next((p for p in i.parts[2:-1] if p in ("and", "or", "xor")), None)
    reads = [machine.reader(operand, kind) for operand in i.operands[1:3]]
    other = machine.reader(i.operands[3], "pred") if join else None
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(join)
    target = i.operands[0]
    writes = [machine.writer(part) for part in (target.parts if hasattr(target, "parts") else (target,))]
    ftz = "ftz" in i.parts
    if ftz and form:
        raise KeyError(i.name)

    def run(mask):
        a, b = (read() for read in reads)
        if kind.endswith("x2"):  # the lower halves to the first predicate, the upper ones to the second
            held, second = (
                compare(*(values16((np.asarray(w) >> np.uint32(at)).astype(np.uint16), form) for w in (a, b)))
                for at in (0, 16)
            )
        else:
            a, b = (values16(a, form), values16(b, form)) if form else (flushed(a), flushed(b)) if ftz else (a, b)
            held = compare(a, b)
            second = ~held
        third = other() if join else None
        writes[0](held if combine is None else combine(held, third), mask)
        if len(writes) > 1:
            writes[1](second if combine is None else combine(second, third), mask)

    return run


@instruction("selp")
def selp(machine, i):
    kind = kind_of(i)
    return nary(machine, i, lambda a, b, held: np.where(held, a, b), [kind, kind, "pred"])
