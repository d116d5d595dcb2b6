"""Matrix products: mma.sync (PTX ISA, "Warp Level Matrix Instructions"); wgmma.py has those of warpgroups.

Sums are made in fp64 and rounded once: nearer than the order in which a tensor core adds, of which nothing is promised.
"""

import numpy as np

from tests.machine.machine import instruction
from tests.machine.memory import Fault
from tests.machine.rounding import small_values, values16

GROUP, QUAD = np.arange(32) // 4, np.arange(32) % 4


def halves(words, form):
    """Words as the two values of each, last."""
    words = np.asarray(words)
    return np.stack([values16((words >> np.uint32(16 * k)).astype(np.uint16), form) for k in (0, 1)], -1)


def bytes_of(words, form):
    return np.stack([small_values(words >> np.uint32(8 * k) & np.uint32(255), form) for k in range(4)], -1)


def nibbles_of(words):
    return np.stack([small_values(words >> np.uint32(4 * k) & np.uint32(15), "e2m1") for k in range(8)], -1)


def tf32(words):
    return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)[..., None]


FORMS = {
    "bf16": (2, lambda w: halves(w, "bf16")), "f16": (2, lambda w: halves(w, "f16")), "tf32": (1, tf32),
    "e4m3": (4, lambda w: bytes_of(w, "e4m3")), "e5m2": (4, lambda w: bytes_of(w, "e5m2")), "e2m1": (8, nibbles_of),
}  # fmt: skip


def fragment_a(words, form):
    """[warp, lane, 4 or 2 registers] as [warp, 16, k]: registers 0 and 2 hold row g, 1 and 3 row g + 8; 2 and 3 the upper half
    of k; a register the elements of quad q one after the other."""
    per, decode = FORMS[form]
    values = decode(words)  # [warp, lane, register, per]
    registers = words.shape[2]
    matrix = np.zeros((len(words), 16, 4 * per * (registers // 2)))
    for register in range(registers):
        rows = GROUP + 8 * (register & 1)
        for e in range(per):
            matrix[:, rows, per * QUAD + e + 4 * per * (register >> 1)] = values[:, :, register, e]
    return matrix


def fragment_b(words, form):
    """[warp, lane, registers] as [warp, k, 8]: column g, rows by quad."""
    per, decode = FORMS[form]
    values = decode(words)
    matrix = np.zeros((len(words), 4 * per * words.shape[2], 8))
    for register in range(words.shape[2]):
        for e in range(per):
            matrix[:, per * QUAD + e + 4 * per * register, GROUP] = values[:, :, register, e]
    return matrix


def fragment_c(words):
    """[warp, lane, 4] fp32 as [warp, 16, 8]."""
    matrix = np.zeros((len(words), 16, 8))
    for register in range(4):
        matrix[:, GROUP + 8 * (register >> 1), 2 * QUAD + (register & 1)] = words[:, :, register]
    return matrix


def from_matrix(matrix):
    """[warp, 16, 8] as the four registers of each lane: [4, warp, lane]."""
    return [matrix[:, GROUP + 8 * (register >> 1), 2 * QUAD + (register & 1)] for register in range(4)]


@instruction("mma")
def mma(machine, i):
    shape = next(p for p in i.parts if p.startswith("m16n8"))
    k = int(shape.rsplit("k", 1)[1])
    scaled = "block_scale" in i.parts
    kinds = [p for p in i.parts if p == "f32" or p in FORMS]  # Triton's compiler has .kind after the layouts
    extra = set(i.parts) - {"mma", "sync", "aligned", shape, "row", "col", *kinds}
    if not scaled and extra or [p for p in i.parts if p in ("row", "col")] != ["row", "col"]:
        raise KeyError(i.name)
    result, form_a, form_b, added = kinds
    if result != "f32" or added != "f32":
        raise KeyError(i.name)
    operands = [machine_parts(o) for o in i.operands[:4]]
    if len(operands[1]) * 2 * FORMS[form_a][0] != k or len(operands[2]) * 4 * FORMS[form_b][0] != k:
        raise KeyError(i.name)
    reads = [[machine.reader(p, "u32") for p in operands[n]] for n in (1, 2)]
    sums = [machine.reader(p, "f32") for p in operands[3]]
    writes = [machine.writer(p) for p in operands[0]]
    scales = block_scales(machine, i, k, extra) if scaled else None

    def run(mask):
        chosen = machine.chosen(mask)
        gather = lambda read: machine.full(read())[chosen].reshape(-1, 32)  # noqa: E731
        a = fragment_a(np.stack([gather(r) for r in reads[0]], -1), form_a)
        b = fragment_b(np.stack([gather(r) for r in reads[1]], -1), form_b)
        if scales:
            a_scales, b_scales = scales(gather)
            a, b = a * a_scales, b * b_scales
        d = (fragment_c(np.stack([gather(r) for r in sums], -1)) + a @ b).astype(np.float32)
        for write, values in zip(writes, from_matrix(d), strict=True):
            write(machine.spread(chosen, np.ascontiguousarray(values.reshape(-1))), mask)

    return machine.warpwide(None, run)


def machine_parts(operand):
    return operand.parts if hasattr(operand, "parts") else (operand,)


# (kind, scales of a row, their type, shape): what there is (PTX ISA, "Valid combinations of .kind, .stype and .scale_vec_size")
BLOCK_SCALES = {
    ("kind::mxf8f6f4", 1, "ue8m0", 32), ("kind::mxf4", 2, "ue8m0", 64), ("kind::mxf4nvf4", 2, "ue8m0", 64),
    ("kind::mxf4nvf4", 4, "ue8m0", 64), ("kind::mxf4nvf4", 4, "ue4m3", 64),
}  # fmt: skip


def block_scales(machine, i, k, modifiers):
    """A function that gives the factors of A's elements and of B's (PTX ISA, "Block Scaling for mma.sync").

    The thread of a selector {byte, thread} says which lanes of a quad bring A's scales, 0 the lower two, 1 the upper two, the
    first of the two row g's, the other row g + 8's; and which one brings those of B's column g. Its byte is the lowest of
    theirs.
    """
    kind = next(p for p in modifiers if p.startswith("kind::"))
    count = {"scale_vec::1X": 1, "scale_vec::2X": 2, "scale_vec::4X": 4}[
        next(p for p in modifiers if p.startswith("scale_vec::"))
    ]
    form = i.parts[-1]
    if (kind, count, form, k) not in BLOCK_SCALES or len(modifiers) != 4:
        raise KeyError(i.name)
    read_a, read_b = (machine.reader(machine_parts(i.operands[at])[0], "u32") for at in (4, 6))
    (byte_a, thread_a), (byte_b, thread_b) = ([p.value for p in i.operands[at].parts] for at in (5, 7))
    for byte, thread, threads in ((byte_a, thread_a, 2), (byte_b, thread_b, 4)):
        if byte not in range(0, 4, count) or thread not in range(threads):
            raise Fault(f"a selector {{{byte}, {thread}}}")

    def decode(words, byte):
        codes = np.stack([words >> np.uint32(8 * (byte + n)) & np.uint32(255) for n in range(count)], -1)
        if form == "ue8m0":
            return np.where(codes == 255, np.nan, np.exp2(codes.astype(np.float64) - 127))
        # seven bits: a byte with the eighth set is no ue4m3, and whatever comes of it, no kernel may count on it
        return np.where(codes > 0x7F, np.nan, small_values(codes & np.uint32(0x7F), "e4m3"))

    def run(gather):
        a, b = gather(read_a), gather(read_b)
        first = 4 * np.arange(8)
        rows = np.concatenate([a[:, first + 2 * thread_a], a[:, first + 2 * thread_a + 1]], 1)
        return (
            np.repeat(decode(rows, byte_a), k // count, -1),
            np.repeat(decode(b[:, first + thread_b], byte_b), k // count, -1).swapaxes(1, 2),
        )

    return run
