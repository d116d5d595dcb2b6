"""The few PTX instructions that the Triton kernels write inline, executed on arrays: from the text of the PTX ISA (9.0), by
rules that share nothing with the kernels' own arithmetic. For Triton's interpreter, which runs no inline assembly.
"""

import re

import numpy as np
import triton.language as tl

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def to_float(words):
    return words.astype(np.uint32).view(np.float32).astype(np.float64)


def to_words(values):
    return values.astype(np.float32).view(np.uint32)


def nearest(x, bits, smallest):
    """x (fp64) to `bits` significant bits, ties to even, no finer than the exponent of the smallest subnormal."""
    exponent = np.frexp(np.where(x == 0, 1.0, x))[1]  # |x| in [2^(e-1), 2^e)
    step = np.exp2(np.maximum(exponent - bits, smallest).astype(np.float64))
    return np.where(np.isfinite(x), np.rint(x / step) * step, x)


def bf16_words(x):
    return to_words(nearest(x, 8, -133)) >> 16


def e2m1_codes(x):
    """To the nearest value, of two as near the one with the even code; what lies beyond 6 becomes 6."""
    distance = np.abs(np.minimum(np.abs(x), 6.0)[..., None] - E2M1)
    first = np.argmin(distance, -1)
    above = np.take_along_axis(distance, np.minimum(first + 1, 7)[..., None], -1)[..., 0]
    tied = (first < 7) & (above == distance.min(-1))
    code = first + (tied & (first % 2 == 1))
    return (code | np.signbit(x).astype(np.int64) << 3).astype(np.uint32)


def prmt(a, b, selector):
    source = [(word >> np.uint32(8 * i)) & np.uint32(255) for word in (a, b) for i in range(4)]
    picked = [source[int(selector.flat[0]) >> 4 * i & 7] for i in range(4)]
    assert not int(selector.flat[0]) & 0x8888, "the sign-replicating mode is not modelled"
    return picked[0] | picked[1] << 8 | picked[2] << 16 | picked[3] << 24


def add_toward_zero(a, b):
    """Of non-negative numbers: the largest fp32 not above the exact sum, which fp64 holds in two parts."""
    a, b = to_float(a), to_float(b)
    total = a + b
    rest = (a - (total - (total - a))) + (b - (total - a))
    rounded = total.astype(np.float32)
    above = (rounded > total) | ((rounded == total) & (rest < 0))
    return np.where(above, np.nextafter(rounded, np.float32(0)), rounded).view(np.uint32)


def fma_bf16x2(a, b, c):
    halves = []
    for shift in (0, 16):
        x, y, z = (to_float((w >> np.uint32(shift)) << np.uint32(16)) for w in (a, b, c))
        halves.append(bf16_words(x * y + z))
    return halves[0] | halves[1] << 16


INSTRUCTIONS = {
    "prmt.b32": prmt,
    "add.rz.f32": add_toward_zero,
    "shr.s32": lambda a, n: (a.view(np.int32) >> n.astype(np.int32)).view(np.uint32),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "fma.rn.bf16x2": fma_bf16x2,
    "cvt.rn.bf16x2.f32": lambda high, low: bf16_words(to_float(high)) << 16 | bf16_words(to_float(low)),
    "cvt.rn.satfinite.e2m1x2.f32": lambda high, low: e2m1_codes(to_float(high)) << 4 | e2m1_codes(to_float(low)),
}


def execute(text, outputs, inputs):
    """The output registers, uint32, after the instructions of `text`, in which $n are outputs, then inputs."""
    registers = {f"${outputs + i}": np.asarray(x, dtype=np.uint32) for i, x in enumerate(inputs)}

    def read(name):
        return registers[name] if name in registers else np.array([int(name, 0)], dtype=np.uint32)

    for line in re.split(r"[;\n]", re.sub(r"\.reg [^;]*;", "", text.strip().removeprefix("{").removesuffix("}"))):
        if not line.strip():
            continue
        name, rest = line.strip().split(None, 1)
        packed = [part.strip() for part in re.findall(r"\{[^}]*\}|[^,\s]+", rest)]
        groups = [re.findall(r"[^\s,{}]+", part) for part in packed]
        if name == "mov.b32" and len(groups[1]) > 1:  # 4 bytes, or 2 halves, to a word
            size = 32 // len(groups[1])
            registers[groups[0][0]] = sum(read(part) << np.uint32(size * i) for i, part in enumerate(groups[1]))
        elif name == "mov.b32":  # a word whole, or to its halves
            for i, part in enumerate(groups[0]):
                word = read(groups[1][0])
                registers[part] = word if len(groups[0]) == 1 else word >> np.uint32(16 * i) & np.uint32(0xFFFF)
        else:
            registers[packed[0]] = INSTRUCTIONS[name](*(read(part) for part in packed[1:]))
    return [registers[f"${i}"] for i in range(outputs)]


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack, _semantic=None):
    """A stand-in for tl.inline_asm_elementwise in the interpreter."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    given = [x.handle.data if isinstance(x, tl.tensor) else np.array([x]) for x in args]
    shape = np.broadcast_shapes(*(x.shape for x in given))
    words = [np.broadcast_to(x.astype(np.int64) if x.dtype != np.float32 else x.view(np.uint32), shape) for x in given]
    made = execute(asm, len(dtypes), [w.astype(np.uint32) for w in words])
    like = next(x for x in args if isinstance(x, tl.tensor))
    results = []
    for word, kind in zip(made, dtypes, strict=True):
        word = np.broadcast_to(word, shape)
        data = (
            word.astype(np.uint16) if kind == tl.bfloat16 else word.view(np.float32 if kind == tl.float32 else np.int32)
        )
        results.append(tl.core.tensor(type(like.handle)(data.copy(), kind), tl.block_type(kind, list(shape))))
    return tuple(results) if isinstance(dtype, tuple) else results[0]
