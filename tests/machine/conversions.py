"""cvt, in the forms that kernels use (PTX ISA, "cvt"): integers, fp32 and the 16-bit formats, FP8, FP4, scales."""

import numpy as np

from tests.machine.arithmetic import flushed
from tests.machine.machine import TYPES, instruction
from tests.machine.rounding import E2M1, rounded, small_values, small_words, to_f32, values16, words16

SMALL = {"e4m3x2": "e4m3", "e5m2x2": "e5m2", "e2m1x2": "e2m1"}
# Of cvt.rs to e2m1x4: the bits of its random word that each operand reads, the highest first. The PTX ISA leaves this open; so
# does the machine, which goes by a public probe of a B300 (QuACK, quack/rounding.py) where nobody says otherwise.
RANDOM_BITS = [[*range(23, 15, -1)], [*range(0, 8)], [*range(31, 23, -1)], [*range(8, 16)]]
INTEGERS = {f"{s}{b}" for s in "us" for b in (8, 16, 32, 64)}


@instruction("cvt")
def cvt(machine, i):
    to, source = i.parts[-2:]
    write = machine.writer(i.operands[0])
    how = next((m for m in ("rn", "rz", "rna", "rni", "rzi", "rmi", "rpi", "rs", "rp") if m in i.parts), None)
    if to in INTEGERS and source in INTEGERS:
        return integers(machine, i, to, source, write)
    if to == "e2m1x4" and how == "rs":
        return stochastic(machine, i, write)
    if to in SMALL and source == "f32":
        return to_small(machine, i, SMALL[to], write)
    if source in SMALL:
        return from_small(machine, i, SMALL[source], to, write)
    if to in ("bf16x2", "f16x2") and source == "f32":
        return halves(machine, i, to.removesuffix("x2"), how, write)
    if to == "tf32":
        read = machine.reader(i.operands[1], "f32")
        return lambda mask: write(
            rounded(read().astype(np.float64), "tf32", how).astype(np.float32).view(np.uint32), mask
        )
    if to in ("bf16", "f16"):
        read = as_double(machine, i.operands[1], source)
        if "relu" in i.parts or "satfinite" in i.parts or "ftz" in i.parts:
            raise KeyError(i.name)
        return lambda mask: write(words16(read(), to, how or "rn"), mask)
    if to in ("f32", "f64"):
        read = as_double(machine, i.operands[1], source)
        if how in ("rni", "rzi", "rmi", "rpi"):
            if to != source or "sat" in i.parts:
                raise KeyError(i.name)
            whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[how]
            before = flushed if "ftz" in i.parts else lambda x: x
            return lambda mask: write(np.asarray(whole(before(read()))).astype(TYPES[to]), mask)
        if source in ("s64", "u64"):  # fp64 does not hold them all
            if how != "rn" or "sat" in i.parts:
                raise KeyError(i.name)
            whole_word = machine.reader(i.operands[1], source)
            return lambda mask: write(np.asarray(whole_word()).astype(TYPES[to]), mask)
        flush = flushed if "ftz" in i.parts else lambda x: x
        limit = (lambda x: np.fmin(np.fmax(x, 0.0), 1.0)) if "sat" in i.parts else lambda x: x  # NaN to 0
        narrow = (lambda x: to_f32(x, how or "rn")) if to == "f32" else lambda x: x
        return lambda mask: write(flush(narrow(limit(np.asarray(read())))), mask)
    if to in INTEGERS and source in ("f32", "f16", "bf16", "f64"):
        return to_integer(machine, i, to, source, how, write)
    raise KeyError(i.name)


def as_double(machine, operand, kind):
    read = machine.reader(operand, kind)
    if kind in ("bf16", "f16"):
        return lambda: values16(read(), kind)
    return lambda: np.asarray(read()).astype(np.float64)


def integers(machine, i, to, source, write):
    read = machine.reader(i.operands[1], source)
    limits = np.iinfo(TYPES[to])
    if "sat" in i.parts:
        return lambda mask: write(
            np.clip(np.asarray(read()).astype(object), limits.min, limits.max).astype(TYPES[to]), mask
        )
    return lambda mask: write(np.asarray(read()).astype(TYPES[to]), mask)


def of_nan(to, source):
    """What NaN becomes: 0, or where one of the types has 64 bits the highest bit alone."""
    if source != "f64" and to not in ("s64", "u64"):
        return 0
    bits = int(to[1:])
    return -(1 << bits - 1) if to[0] == "s" else 1 << bits - 1


def to_integer(machine, i, to, source, how, write):
    if "ftz" in i.parts and how not in ("rni", "rzi"):
        raise KeyError(i.name)
    read = as_double(machine, i.operands[1], source)
    nan = of_nan(to, source)
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[how]
    limits = np.iinfo(TYPES[to])

    def run(mask):
        """What lies beyond the type becomes its limit."""
        x = whole(read())
        inside = np.where((x > limits.min) & (x < limits.max), x, 0).astype(TYPES[to])
        most, least, none = (np.array(v, TYPES[to]) for v in (limits.max, limits.min, nan))
        whole_range = np.where(x >= limits.max, most, np.where(x <= limits.min, least, inside))
        write(np.where(np.isnan(x), none, whole_range), mask)

    return run


def halves(machine, i, form, how, write):
    """Two fp32 to a word: the first of them to its upper half."""
    upper, lower = (as_double(machine, operand, "f32") for operand in i.operands[1:3])
    relu = "relu" in i.parts
    if "satfinite" in i.parts or how not in ("rn", "rz"):
        raise KeyError(i.name)

    def run(mask):
        words = [words16(np.where(x < 0, 0.0, x) if relu else x, form, how) for x in (upper(), lower())]
        write(words[0].astype(np.uint32) << np.uint32(16) | words[1], mask)

    return run


def to_small(machine, i, form, write):
    if "satfinite" not in i.parts or "rn" not in i.parts or "relu" in i.parts:
        raise KeyError(i.name)
    upper, lower = (as_double(machine, operand, "f32") for operand in i.operands[1:3])
    bits = 4 if form == "e2m1" else 8
    dtype = np.uint8 if bits == 4 else np.uint16
    return lambda mask: write(
        (small_words(upper(), form).astype(dtype) << dtype(bits)) | small_words(lower(), form).astype(dtype), mask
    )


def stochastic(machine, i, write):
    """Four fp32 to E2M1, the first to the highest bits: away from zero where the sum of eight random bits and of those that are
    cut off the magnitude carries (PTX ISA, cvt, ".rs")."""
    if i.parts[1:3] != ["rs", "satfinite"] or len(i.parts) != 5:
        raise KeyError(i.name)
    values = [as_double(machine, operand, "f32") for operand in i.operands[1].parts]
    word = machine.reader(i.operands[2], "u32")

    def run(mask):
        random, out = np.asarray(word()), np.uint16(0)
        for read, bits in zip(values, RANDOM_BITS, strict=True):
            x = read()
            below = np.searchsorted(E2M1, np.minimum(np.abs(x), 6.0), "right") - 1  # of NaN: 7
            lost = np.floor(256 * (np.abs(x) - E2M1[below]) / np.diff(E2M1, append=np.inf)[below])
            added = sum((random >> np.uint32(bit) & np.uint32(1)) << np.uint32(7 - n) for n, bit in enumerate(bits))
            code = below + (lost + added >= 256)
            sign = np.where(np.isnan(x), 0, np.signbit(x)) * 8
            out = out << np.uint16(4) | (code + sign).astype(np.uint16)
        write(out, mask)

    return run


def from_small(machine, i, form, to, write):
    if to != "f16x2" or "relu" in i.parts:
        raise KeyError(i.name)
    bits = 4 if form == "e2m1" else 8
    read = machine.reader(i.operands[1], "u8" if bits == 4 else "u16")

    def run(mask):
        codes = np.asarray(read()).astype(np.uint32)
        low, high = (
            words16(small_values(c & np.uint32((1 << bits) - 1), form), "f16")
            for c in (codes, codes >> np.uint32(bits))
        )
        write(high.astype(np.uint32) << np.uint32(16) | low, mask)

    return run
