"""Tensor memory and the tensor cores behind it (PTX ISA, "Tensor Memory", "tcgen05" and the sections named below).

A block has 128 lanes of 512 columns of 32 bits; an address is lane << 16 | column. Products and copies happen when a thread
waits for the barrier that they are committed to (barriers.py), loads and stores at their tcgen05.wait.
"""

from dataclasses import dataclass

import numpy as np

from tests.machine import barriers
from tests.machine.machine import instruction
from tests.machine.memory import Fault
from tests.machine.parse import Address
from tests.machine.rounding import small_values, values16
from tests.machine.tensor_cores import FORMS, machine_parts

LANES, COLUMNS = 128, 512


class TensorMemory:
    """Of all blocks of a launch."""

    def __init__(self, machine):
        self.content = np.full((machine.blocks, LANES, COLUMNS), 0xFFFFFFFF, np.uint32)  # NaN: nobody has written
        self.owner = np.zeros((machine.blocks, COLUMNS), np.int64)  # which allocation a column belongs to; 0: none
        self.relinquished = np.zeros(machine.blocks, bool)
        self.loads, self.stores = [], []  # on their way
        self.allocations = 0
        # "tcgen05.fence": lanes that have used it and not fenced since; that have met others and not fenced since; blocks
        # whose tensor memory anybody has used. Triton's kernels have no such fences.
        self.before, self.after = np.zeros(machine.lanes, bool), np.zeros(machine.lanes, bool)
        self.used = np.zeros(machine.blocks, bool)

    def use(self, machine, lanes) -> None:
        if (self.after[lanes] & self.used[machine.block[lanes]]).any() and not machine.kernel.loads_at_once:
            raise Fault("no tcgen05.fence::after_thread_sync since threads met")
        self.before[lanes], self.used[machine.block[lanes]] = True, True

    def tell(self, machine, lanes) -> None:
        """When lanes let others go on."""
        if self.before[lanes].any() and not machine.kernel.loads_at_once:
            raise Fault("no tcgen05.fence::before_thread_sync since tensor memory was used")

    def meet(self, lanes) -> None:
        """When lanes go on, having waited for others."""
        self.after[lanes] = True

    def check(self, block: int, columns) -> None:
        if np.min(columns) < 0 or np.max(columns) >= COLUMNS or not self.owner[block, columns].all():
            raise Fault(f"tensor memory that is not allocated: columns {np.min(columns)} to {np.max(columns)}")

    def read(self, block, lanes, columns) -> np.ndarray:
        self.check(block, columns)
        return self.content[block, lanes, columns]

    def write(self, block, lanes, columns, words) -> None:
        self.check(block, columns)
        self.content[block, lanes, columns] = words


def memory_of(machine) -> TensorMemory:
    if machine.tensor_memory is None:
        machine.tensor_memory = TensorMemory(machine)
    return machine.tensor_memory


def ended(machine) -> None:
    memory = machine.tensor_memory
    if memory is None:
        return
    if memory.owner.any():
        raise Fault("tensor memory that nobody has freed")
    if memory.loads or memory.stores:
        raise Fault("loads from tensor memory, or stores, that nobody has waited for")


@instruction("tcgen05")
def tcgen05(machine, i):
    if "cta_group::2" in i.parts:
        raise KeyError("cta_group::2")
    what = i.parts[1]
    if what.startswith("fence::"):
        return fence(machine, what)
    return {
        "alloc": allocate, "dealloc": free, "relinquish_alloc_permit": relinquish, "ld": load, "st": store,
        "wait::ld": loaded, "wait::st": stored, "cp": copy, "mma": multiply, "commit": commit,
    }[what](machine, i)  # fmt: skip


def fence(machine, what):
    """All that is done is seen by all, here; but that there is a fence is checked (PTX ISA, "tcgen05.fence")."""
    before = {"fence::before_thread_sync": True, "fence::after_thread_sync": False}[what]

    def run(mask):
        memory = memory_of(machine)
        (memory.before if before else memory.after)[machine.chosen(mask)] = False

    return run


def warps(machine, mask) -> np.ndarray:
    return machine.chosen(mask).reshape(-1, 32)


def one(values, what: str):
    """What all lanes of a warp must agree about."""
    if (values != values[0]).any():
        raise Fault(f"{what} that lanes do not agree about")
    return int(values[0])


# Allocation (PTX ISA, "tcgen05.alloc, tcgen05.dealloc, tcgen05.relinquish_alloc_permit")


def columns_of(count: int) -> int:
    if count not in (32, 64, 128, 256, 512):
        raise Fault(f"{count} columns")
    return count


def allocate(machine, i):
    """The last columns that are free: nobody should count on the first."""
    if "shared::cta" not in i.parts:
        raise KeyError(i.name)
    to, count = machine.address(i.operands[0], 4), machine.reader(i.operands[1], "u32")

    def run(mask):
        memory = memory_of(machine)
        for lanes in warps(machine, mask):
            block = machine.block[lanes[0]]
            if memory.relinquished[block]:
                raise Fault("the permit to allocate has been given back")
            wanted = columns_of(one(machine.full(count())[lanes], "a count"))
            starts = [
                at for at in range(COLUMNS - wanted, -1, -wanted) if not memory.owner[block, at : at + wanted].any()
            ]
            if not starts:
                raise Fault(f"no room for {wanted} columns")
            memory.allocations += 1
            memory.owner[block, starts[0] : starts[0] + wanted] = memory.allocations
            memory.content[block, :, starts[0] : starts[0] + wanted] = 0xFFFFFFFF
            one(to()[lanes], "an address")
            machine.shared.store(machine.block[lanes[:1]], to()[lanes[:1]], np.array([starts[0]], np.uint32))

    return machine.warpwide(None, run)


def free(machine, i):
    where, count = machine.reader(i.operands[0], "u32"), machine.reader(i.operands[1], "u32")

    def run(mask):
        memory = memory_of(machine)
        memory.use(machine, machine.chosen(mask))
        for lanes in warps(machine, mask):
            owner = memory.owner[machine.block[lanes[0]]]
            first, wanted = (
                one(machine.full(where())[lanes], "an address"),
                columns_of(int(machine.full(count())[lanes[0]])),
            )
            mine = owner == owner[first] if first < COLUMNS else owner < 0
            if not owner[first] or mine.sum() != wanted or not mine[first : first + wanted].all():
                raise Fault(f"columns {first} to {first + wanted - 1} were not allocated so")
            owner[mine] = 0

    return machine.warpwide(None, run)


def relinquish(machine, i):
    def run(mask):
        memory_of(machine).relinquished[machine.block[warps(machine, mask)[:, 0]]] = True

    return machine.warpwide(None, run)


# Between registers and tensor memory (PTX ISA, "tcgen05.ld", "tcgen05.st", "Data Movement Shape")


def fragment(shape: str, count: int, half: int):
    """(lane, column) of each register of each lane of a warp, from the address on: [32, count] each."""
    lane, register = np.arange(32)[:, None], np.arange(count)[None]
    if shape == "32x32b":
        return np.broadcast_to(lane, (32, count)), np.broadcast_to(register, (32, count))
    if shape == "16x32bx2":  # the upper half of the warp has the same 16 lanes, further columns
        return np.broadcast_to(lane % 16, (32, count)), register + lane // 16 * half
    raise KeyError(shape)


def moved(machine, i, address, registers, half):
    """A function of a mask: warp by warp (its lanes, block, lanes and columns of tensor memory)."""
    shape, times, *rest = i.parts[4:]
    if i.parts[2:4] != ["sync", "aligned"] or rest != ["b32"] or times != f"x{len(registers)}":
        raise KeyError(i.name)
    rows, columns = fragment(shape, len(registers), half)
    where = machine.address(address, 4)

    def run(mask):
        memory_of(machine).use(machine, machine.chosen(mask))
        for lanes in warps(machine, mask):
            at = one(where()[lanes], "an address")
            first = (at >> 16) + rows
            warp = lanes[0] % machine.threads // 32
            if (first // 32 != warp % 4).any():  # "Access restrictions"
                raise Fault(f"lanes {first.min()} to {first.max()} from warp {warp}")
            yield lanes, machine.block[lanes[0]], first, (at & 0xFFFF) + columns

    return run


def load(machine, i):
    address = next(k for k, o in enumerate(i.operands) if isinstance(o, Address))
    half = i.operands[address + 1].value if len(i.operands) > address + 1 else 0
    registers = machine_parts(i.operands[0])
    writes = [machine.writer(r) for r in registers]
    each = moved(machine, i, i.operands[address], registers, half)

    def run(mask):
        memory = memory_of(machine)
        values = np.full((len(writes), machine.lanes), 0xFFFFFFFF, np.uint32)  # until the wait
        for lanes, block, rows, columns in each(mask):
            words = memory.read(block, rows, columns)
            memory.loads.append((lanes, block, rows, columns, words, writes))
            if machine.kernel.loads_at_once:
                values[:, lanes] = words.T
        for write, value in zip(writes, values, strict=True):
            write(value, mask)

    return machine.warpwide(None, run)


def store(machine, i):
    half = i.operands[1].value if len(i.operands) > 2 else 0
    registers = machine_parts(i.operands[-1])
    reads = [machine.reader(r, "u32") for r in registers]
    each = moved(machine, i, i.operands[0], registers, half)

    def run(mask):
        memory = memory_of(machine)
        for lanes, block, rows, columns in each(mask):
            memory.check(block, columns)
            words = np.stack([machine.full(read())[lanes] for read in reads], 1)
            memory.stores.append((lanes, block, rows, columns, words))

    return machine.warpwide(None, run)


def mine(records, mask):
    """The records of the warps of a mask, and the others."""
    chosen = [mask is None or mask[record[0]].all() for record in records]
    return [r for r, c in zip(records, chosen, strict=True) if c], [
        r for r, c in zip(records, chosen, strict=True) if not c
    ]


def loaded(machine, i):
    def run(mask):
        memory = memory_of(machine)
        done, memory.loads = mine(memory.loads, mask)
        for writes in {id(r[5]): r[5] for r in done}.values():
            records = [r for r in done if r[5] is writes]
            here = np.zeros(machine.lanes, bool)
            values = np.zeros((len(writes), machine.lanes), np.uint32)
            for lanes, block, rows, columns, words, _ in records:
                if (memory.read(block, rows, columns) != words).any():
                    raise Fault("tensor memory that changed while it was loaded")
                here[lanes] = True
                values[:, lanes] = words.T
            for write, value in zip(writes, [] if machine.kernel.loads_at_once else values, strict=False):
                write(value, None if here.all() else here)

    return machine.warpwide(None, run)


def stored(machine, i):
    def run(mask):
        memory = memory_of(machine)
        done, memory.stores = mine(memory.stores, mask)
        for _, block, rows, columns, words in done:
            memory.write(block, rows, columns, words)

    return machine.warpwide(None, run)


# Matrices in shared memory


@dataclass(frozen=True)
class Matrix:
    """A shared memory descriptor (PTX ISA, tcgen05, "Shared memory descriptor")."""

    start: int
    leading: int
    stride: int
    span: int  # bytes of the swizzle; 16: none

    @staticmethod
    def of(word: int) -> "Matrix":
        swizzles = {0: 16, 2: 128, 4: 64, 6: 32}
        if word >> 46 & 7 != 1 or word >> 49 & 7 or word >> 52 & 0x1FF or word >> 14 & 3 or word >> 30 & 3:
            raise Fault(f"shared memory descriptor {word:#x}")
        if word >> 61 not in swizzles:
            raise Fault(f"swizzle {word >> 61}")
        fields = (16 * (word >> at & 0x3FFF) for at in (0, 16, 32))
        return Matrix(*fields, swizzles[word >> 61])

    def addresses(self, along, across, along_rows: bool):
        """Of bytes `along` the direction in which memory runs and `across` it ("Canonical Layouts"): atoms of 8 across by
        the swizzle's span along. Where memory runs along k the stride leads from eight rows to the next; what leads from
        span to span is not used under a swizzle. Where it runs along the rows, the leading offset leads from span to span
        and the stride from eight k to the next; without a swizzle these two change places."""
        span = self.span
        at = self.start + along % span + across % 8 * span
        if along_rows:
            spans, eights = (self.stride, self.leading) if span == 16 else (self.leading, self.stride)
        else:
            spans, eights = self.leading, self.stride
            if span > 16 and np.max(self.start % span + along) >= span:
                raise Fault("a matrix that goes beyond its swizzle's span along k")
        at = at + along // span * spans + across // 8 * eights
        if span > 16:  # of addresses: bits 4.. by those from 7 on
            at = at ^ (at >> 7 & span // 16 - 1) << 4
        return at


def shared_bytes(machine, block, matrix: Matrix, along, across, along_rows, width):
    addresses = matrix.addresses(along, across, along_rows)
    blocks = np.full(addresses.shape, block)
    barriers.check_shown(machine, blocks, addresses, width)
    return machine.shared.load(blocks, addresses, width)


def shared_matrix(machine, block, word: int, rows: int, form: str, along_rows: bool) -> np.ndarray:
    """[rows, k] of 32 bytes of k."""
    matrix, row = Matrix.of(word), np.arange(rows)[:, None]
    if form == "e2m1":
        if along_rows:
            raise Fault("E2M1 that does not run along k")
        codes = shared_bytes(machine, block, matrix, np.arange(32)[None], row, False, 1)
        return small_values(np.stack([codes & 15, codes >> 4], -1).reshape(rows, 64), form)
    size = {"f16": 2, "bf16": 2, "tf32": 4}[form]
    column = np.arange(32 // size)[None]
    if along_rows and size == 4:
        raise Fault("TF32 that does not run along k")  # only with swizzling by 32 bytes, which is not modelled
    along, across = (row * size, column) if along_rows else (column * size, row)
    words = shared_bytes(machine, block, matrix, along, across, along_rows, size)
    return values16(words, form) if size == 2 else FORMS["tf32"][1](words)[..., 0]


def copy(machine, i):
    """32 rows of 16 bytes to the same four columns of all four times 32 lanes (PTX ISA, "tcgen05.cp")."""
    if i.parts[3:] != ["32x128b", "warpx4"]:
        raise KeyError(i.name)
    to, source = machine.address(i.operands[0], 4), machine.reader(i.operands[1], "u64")

    def run(mask):
        memory_of(machine).use(machine, machine.chosen(mask))
        for lane in machine.chosen(mask):
            at, word, block = int(to()[lane]), int(machine.full(source())[lane]), machine.block[lane]
            if at >> 16:
                raise Fault("a copy that does not begin at lane 0")

            def carry(at=at, word=word, block=block):
                rows = np.arange(32)[:, None]
                words = shared_bytes(machine, block, Matrix.of(word), np.arange(0, 16, 4)[None], rows, False, 4)
                for quarter in range(4):
                    memory_of(machine).write(block, 32 * quarter + rows, at + np.arange(4)[None], words)

            barriers.begin(machine, lane, "copy", carry)

    return run


# Products


@dataclass(frozen=True)
class Kind:
    """An instruction descriptor (PTX ISA, tcgen05, "Instruction descriptor")."""

    a: str
    b: str
    m: int
    n: int
    negative_a: bool
    negative_b: bool
    turned_a: bool
    turned_b: bool

    @staticmethod
    def of(word: int, kind: str) -> "Kind":
        field = lambda at, bits: word >> at & (1 << bits) - 1  # noqa: E731
        if kind == "mxf4nvf4":
            forms = {1: "e2m1"}
            m, reserved, scales = (
                field(27, 2) << 7,
                field(0, 4) | field(6, 1) | field(12, 1) | field(24, 3),
                field(23, 1),
            )
            if scales or field(4, 2) or field(29, 2) or field(31, 1):
                raise Fault(f"scales that are not E4M3, four a row from the first byte, or K = 96: {word:#x}")
            b = field(10, 2)
        else:
            forms = {"f16": {0: "f16", 1: "bf16"}, "tf32": {2: "tf32"}}[kind]
            m, reserved = field(24, 5) << 4, field(0, 4) | field(6, 1) | field(23, 1) | field(29, 3)
            if field(4, 2) != 1:
                raise Fault("sums that are not FP32")
            b = field(10, 3)
        a = field(7, 3)
        if reserved or a not in forms or b not in forms:
            raise Fault(f"instruction descriptor {word:#x}")
        made = Kind(forms[a], forms[b], m, field(17, 6) << 3, *(bool(field(at, 1)) for at in (13, 14, 15, 16)))
        made.check(kind, word)
        return made

    def check(self, kind: str, word: int) -> None:
        """ "Matrix shape"; A and B under block scales run along k."""
        step = 16 if self.m == 128 and kind != "mxf4nvf4" else 8
        if self.m not in ((128,) if kind == "mxf4nvf4" else (64, 128)) or not 8 <= self.n <= 256 or self.n % step:
            raise Fault(f"a product of {self.m} by {self.n}: {word:#x}")
        if kind == "mxf4nvf4" and (self.turned_a or self.turned_b):
            raise Fault("E2M1 that does not run along k")


def lanes_of(m: int, first: int) -> np.ndarray:
    """Which lane has a row ("Data Path Layout Organization", D and F): of 64 rows every 32 lanes have 16."""
    row = np.arange(m)
    if m == 64 and first in (0, 16):
        return row // 16 * 32 + row % 16 + first
    if m == 128 and first == 0:
        return row
    raise Fault(f"{m} rows from lane {first} on")


def tensor_matrix(machine, block, at: int, m: int, form: str) -> np.ndarray:
    """A in tensor memory: 32 bytes of k, a row a lane, low bits first ("Packing formats")."""
    words = memory_of(machine).read(block, lanes_of(m, at >> 16)[:, None], (at & 0xFFFF) + np.arange(8)[None])
    return FORMS[form][1](words).reshape(m, -1)


def scales(machine, block, at: int, rows: int) -> np.ndarray:
    """[rows, 64] UE4M3: four a row, those of row r in lane r % 32 of column r / 32, in each of the four times 32 lanes
    ("Block Scaling", layout of the scale factors, scale_vec::4X)."""
    if at >> 16:
        raise Fault("scales that do not begin at lane 0")
    row = np.arange(rows)
    copies = [memory_of(machine).read(block, 32 * q + row % 32, at + row // 32) for q in range(4)]
    words = np.where(np.all([c == copies[0] for c in copies], 0), copies[0], np.uint32(0xFFFFFFFF))
    codes = np.stack([words >> np.uint32(8 * k) & np.uint32(255) for k in range(4)], -1)
    values = np.where(codes >= 0x7F, np.nan, small_values(codes & 0x7F, "e4m3"))  # 0x7F is NaN, the rest undefined
    return np.repeat(values, 16, 1)


def multiply(machine, i):
    kind = next(p for p in i.parts if p.startswith("kind::")).removeprefix("kind::")
    scaled = kind == "mxf4nvf4"
    if i.parts[2] != "cta_group::1" or i.parts[4:] not in (
        [],
        ["block_scale", "scale_vec::4X"],
        ["block_scale", "block16"],
    ):
        raise KeyError(i.name)
    if (
        scaled != bool(i.parts[4:])
        or kind not in ("f16", "tf32", "mxf4nvf4")
        or len(i.operands) != (7 if scaled else 5)
    ):
        raise KeyError(i.name)
    d, b, word = (
        machine.address(i.operands[0], 4),
        machine.reader(i.operands[2], "u64"),
        machine.reader(i.operands[3], "u32"),
    )
    from_tensor_memory = isinstance(i.operands[1], Address)
    a = machine.address(i.operands[1], 4) if from_tensor_memory else machine.reader(i.operands[1], "u64")
    where = [machine.address(o, 4) for o in i.operands[4:6]] if scaled else []
    adds = machine.reader(i.operands[-1], "pred")

    def run(mask):
        memory_of(machine).use(machine, machine.chosen(mask))
        for lane in machine.chosen(mask):
            given = [int(machine.full(read())[lane]) for read in (d, a, b, word, *where)]
            add = bool(machine.full(adds())[lane])
            block, described = machine.block[lane], Kind.of(given[3], kind)

            def compute(given=given, add=add, block=block, p=described):
                to, left, right, _, *at = given
                if from_tensor_memory:
                    x = tensor_matrix(machine, block, left, p.m, p.a)
                else:
                    x = shared_matrix(machine, block, left, p.m, p.a, p.turned_a)
                y = shared_matrix(machine, block, right, p.n, p.b, p.turned_b)
                if scaled:
                    x, y = x * scales(machine, block, at[0], p.m), y * scales(machine, block, at[1], p.n)
                sums = x @ y.T * (-1.0 if p.negative_a != p.negative_b else 1.0)
                memory, lanes = memory_of(machine), lanes_of(p.m, to >> 16)[:, None]
                columns = (to & 0xFFFF) + np.arange(p.n)[None]
                if add:
                    sums += memory.read(block, lanes, columns).view(np.float32)
                memory.write(block, lanes, columns, sums.astype(np.float32).view(np.uint32))

            barriers.begin(machine, lane, "product", compute, (given[0], described.m, described.n))

    return run


def commit(machine, i):
    """One arrival, once what the thread has issued before is done (PTX ISA, "tcgen05.commit"). Triton 3.6 names no space; its
    addresses are shared ones all the same."""
    if [p for p in i.parts[2:] if p != "shared::cluster"] != ["cta_group::1", "mbarrier::arrive::one", "b64"]:
        raise KeyError(i.name)
    where = barriers.place(machine, i.operands[0])

    def run(mask):
        chosen = machine.chosen(mask)
        memory_of(machine).before[chosen] = False  # which it implies
        for lane, key in zip(chosen, where(chosen), strict=True):
            barriers.begin(machine, lane, "commit", lambda key=int(key): barriers.arrived(machine, key), int(key))

    return run
