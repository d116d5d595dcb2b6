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


# (kind, scales of a row, their type, shape): what there is (PTX ISA, mma, "Valid combinations of .kind, .stype and .scale_vec_size")
BLOCK_SCALES = {
    ("kind::mxf8f6f4", 1, "ue8m0", 32), ("kind::mxf4", 2, "ue8m0", 64), ("kind::mxf4nvf4", 2, "ue8m0", 64),
    ("kind::mxf4nvf4", 4, "ue8m0", 64), ("kind::mxf4nvf4", 4, "ue4m3", 64),
}  # fmt: skip


def block_scales(machine, i, k, modifiers):
    """A function that gives the factors of A's elements and of B's (PTX ISA, "Block Scaling for mma.sync").

    The thread of a selector {byte, thread} says which lanes of a quad bring A's scales, 0 the lower two, 1 the upper two, the
    first of the two row g's, the other row g + 8's; and which one brings those of B's column g. Its byte is the lowest of theirs.
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
    words = machine.shared.load(blocks, at, size)
    if size == 2:
        return values16(words, form)
    if size == 4:
        return tf32(words)[..., 0]
    return small_values(words, form)
