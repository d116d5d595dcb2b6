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


SHAPES = {  # k of the shape by the elements' width in bits
    "m16n8k8": {32}, "m16n8k16": {16}, "m16n8k32": {8}, "m16n8k64": {4}, "m16n8k4": {32},
}  # fmt: skip


@instruction("mma")
def mma(machine, i):
    shape = next(p for p in i.parts if p.startswith("m16n8"))
    k = int(shape.rsplit("k", 1)[1])
    scaled = "block_scale" in i.parts
    kinds = i.parts[i.parts.index("col") + 1 :]
    if kinds[0] != "f32" or kinds[3] != "f32":
        raise KeyError(i.name)
    form_a, form_b = kinds[1:3]
    operands = [machine_parts(o) for o in i.operands[:4]]
    if len(operands[1]) * 2 * FORMS[form_a][0] != k or len(operands[2]) * 4 * FORMS[form_b][0] != k:
        raise KeyError(i.name)
    reads = [[machine.reader(p, "u32") for p in operands[n]] for n in (1, 2)]
    sums = [machine.reader(p, "f32") for p in operands[3]]
    writes = [machine.writer(p) for p in operands[0]]
    scales = block_scales(machine, i, k) if scaled else None

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


def block_scales(machine, i, k):
    """Of rows g, g + 8 of A from lanes 4g, 4g + 1, of column g of B from lane 4g (PTX ISA, "Block Scaling for mma.sync")."""
    if i.parts[-1] not in ("ue4m3", "ue8m0"):
        raise KeyError(i.name)
    count = int(next(p for p in i.parts if p.startswith("scale_vec::")).split("::")[1][0])
    read_a, (byte_a, thread_a) = machine.reader(i.operands[4], "u32"), (p.value for p in i.operands[5].parts)
    read_b, (byte_b, thread_b) = machine.reader(i.operands[6], "u32"), (p.value for p in i.operands[7].parts)
    if count == 4 and (byte_a or byte_b):
        raise Fault("four scales a register leave no byte to choose")

    def decode(words, byte):
        codes = np.stack([words >> np.uint32(8 * (byte + n)) & np.uint32(255) for n in range(count)], -1)
        if i.parts[-1] == "ue8m0":
            return np.where(codes == 255, np.nan, np.exp2(codes.astype(np.float64) - 127))
        return small_values(codes & np.uint32(0x7F), "e4m3")

    def run(gather):
        a, b = gather(read_a), gather(read_b)
        groups = np.arange(8)
        rows = np.concatenate(
            [a[:, 4 * groups + 2 * thread_a], a[:, 4 * groups + 2 * thread_a + 1]], 1
        )  # rows g, then g + 8
        columns = b[:, 4 * groups + thread_b]
        return (
            np.repeat(decode(rows, byte_a), k // count, -1),
            np.repeat(decode(columns, byte_b), k // count, -1).swapaxes(1, 2),
        )

    return run
