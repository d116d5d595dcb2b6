"""Matrix products: mma.sync and wgmma (PTX ISA, "Warp Level Matrix Instructions", "Asynchronous Warpgroup Level Matrix").

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


# wgmma: a product is made when it is waited for, of what shared memory holds then


@instruction("wgmma")
def wgmma(machine, i):
    what = i.parts[1]
    if what == "fence":
        return lambda mask: None
    if what == "commit_group":
        return machine.warpwide(None, lambda mask: commit(machine, mask))
    if what == "wait_group":
        left = i.operands[0].value
        return machine.warpwide(None, lambda mask: finish(machine, mask, left))
    return multiply(machine, i)


def commit(machine, mask):
    for record in machine.products:
        if record["group"] is None and (mask is None or mask[record["lanes"]].all()):
            record["group"] = 0
        elif record["group"] is not None and (mask is None or mask[record["lanes"]].all()):
            record["group"] += 1  # how many groups came later


def finish(machine, mask, left):
    kept = []
    for record in machine.products:
        if record["group"] is not None and record["group"] >= left and (mask is None or mask[record["lanes"]].all()):
            record["run"]()
        else:
            kept.append(record)
    machine.products = kept


def multiply(machine, i):
    shape = next(p for p in i.parts if p.startswith("m64n"))
    n, k = (int(x) for x in shape[4:].split("k"))
    result, form_a, form_b = i.parts[i.parts.index(shape) + 1 :]
    if result != "f32" or form_a not in ("bf16", "f16", "e4m3", "e5m2", "tf32"):
        raise KeyError(i.name)
    size = {"bf16": 2, "f16": 2, "tf32": 4}.get(form_a, 1)
    d = machine_parts(i.operands[0])
    writes, sums = [machine.writer(p) for p in d], [machine.reader(p, "f32") for p in d]
    from_registers = hasattr(i.operands[1], "parts")
    if from_registers:
        a = [machine.reader(p, "u32") for p in i.operands[1].parts]
    else:
        a = machine.reader(i.operands[1], "u64")
    b = machine.reader(i.operands[2], "u64")
    adds = machine.reader(i.operands[3], "pred")
    flags = [o.value for o in i.operands[4:]]
    if flags[:2] != [1, 1]:
        raise KeyError("negated operands")
    turned_a, turned_b = (0, 0) if size != 2 else ((0, flags[2]) if from_registers else flags[2:4])

    def run(mask):
        chosen = machine.chosen(mask)
        groups = chosen.reshape(-1, 128)
        first = groups[:, 0]
        if from_registers:
            words = np.stack([machine.full(r())[chosen].reshape(-1, 32) for r in a], -1)
            fixed = fragment_a(words, form_a).reshape(-1, 64, k)
            describe_a = None
        else:
            describe_a, fixed = machine.full(a())[first], None
        describe_b = machine.full(b())[first]
        held = np.broadcast_to(adds(), (machine.lanes,))[first]

        def compute():
            left = fixed if fixed is not None else matrix(machine, first, describe_a, 64, k, size, form_a, turned_a)
            right = matrix(machine, first, describe_b, n, k, size, form_b, turned_b)
            product = left @ right.swapaxes(1, 2)  # [group, 64, n]
            warps = product.reshape(-1, 16, n)
            within = np.zeros(machine.lanes, bool)
            within[chosen] = True
            whole = None if within.all() else within
            keep = np.repeat(held, 128)
            for tile in range(n // 8):
                parts = from_matrix(warps[:, :, 8 * tile : 8 * tile + 8])
                for register, values in enumerate(parts):
                    at = 4 * tile + register
                    before = np.where(keep, machine.full(sums[at]())[chosen], np.float32(0)).astype(np.float64)
                    total = (before + values.reshape(-1)).astype(np.float32)
                    writes[at](machine.spread(chosen, total), whole)

        machine.products.append({"group": None, "lanes": chosen, "run": compute})

    return machine.warpwide(None, run)


def matrix(machine, lanes, descriptors, rows, k, size, form, turned):
    """[group, rows, k] of what descriptors say of shared memory (PTX ISA, "Matrix Descriptor Format")."""
    d = descriptors.astype(np.int64)
    start, leading, stride = d & 0x3FFF, d >> 16 & 0x3FFF, d >> 32 & 0x3FFF
    start, leading, stride = 16 * start, 16 * leading, 16 * stride
    swizzle = descriptors >> np.uint64(62)
    if (swizzle != swizzle[0]).any() or (d >> 49 & 7).any():
        raise Fault("descriptors of several kinds, or with a base offset")
    span = {0: 16, 1: 128, 2: 64, 3: 32}[int(swizzle[0])]
    row, column = np.arange(rows)[:, None], np.arange(k)[None, :]
    if turned:  # the rows lie along memory: boxes of `span` bytes of rows by 8 of k
        along, across = row * size, column
    else:
        along, across = column * size, row
    at = along % span + across % 8 * span
    shape = (len(d), 1, 1)
    if span == 16:
        unit, other = (stride, leading) if turned else (leading, stride)
        at = at[None] + along[None] // span * unit.reshape(shape) + across[None] // 8 * other.reshape(shape)
    else:
        at = at[None] + along[None] // span * leading.reshape(shape) + across[None] // 8 * stride.reshape(shape)
    at = at + start.reshape(shape)
    if span > 16:  # bits 4.. are mixed with those from bit 7 on
        at = at ^ (at >> 7 & span // 16 - 1) << 4
    blocks = np.broadcast_to(machine.block[lanes].reshape(shape), at.shape)
    words = machine.shared.load(blocks, at, size, lanes.reshape(shape))
    if size == 2:
        return values16(words, form)
    if size == 4:
        return tf32(words)[..., 0]
    return small_values(words, form)
