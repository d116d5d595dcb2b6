"""wgmma (PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions").

A product is made when it is waited for. From its issue until then its sums are spoilt: who reads them has NaN. What it reads,
of shared memory and of A's registers, is read at its issue and at the wait, and must be the same. Sums are made in fp64 and
rounded once an instruction.
"""

import numpy as np

from tests.machine.barriers import check_shown
from tests.machine.machine import instruction
from tests.machine.memory import Fault
from tests.machine.rounding import small_values, values16
from tests.machine.tensor_cores import FORMS, fragment_a, from_matrix, machine_parts

SPOILT = np.uint32(0x7FFAA5A5)
SIZES = {"bf16": 2, "f16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1}
SPANS = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a swizzled row by the descriptor's mode
RESERVED = np.uint64(~(0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62) & (1 << 64) - 1)


class Products:
    """Of a launch: those on their way, the sums behind them, what fences have ordered. Warpgroups go by number."""

    def __init__(self, machine):
        if machine.threads % 128:
            raise Fault(f"warpgroups of blocks of {machine.threads} threads")
        self.groups = machine.lanes // 128
        self.issued = []  # in order
        self.sums = {}  # by the names of the registers
        self.fenced = [None] * self.groups  # the registers as they were at each warpgroup's last fence
        self.written = {}  # by name: what products themselves have written last

    def forget(self):
        self.issued = [p for p in self.issued if p.groups.size]


class Sums:
    """The sums that products of a shape have in registers of these names."""

    def __init__(self, groups, shape):
        self.shape = shape
        self.matrix = np.zeros((groups, *shape), np.float32)
        self.products = np.zeros(groups, np.int64)  # on their way


class Product:
    """One instruction for some warpgroups; what it has of each is a row of `of`."""

    def __init__(self, what, groups, **of):
        self.what, self.groups, self.of = what, groups, of
        self.later = np.full(len(groups), -1)  # how many groups have been committed since its own; -1: it is in none

    def taken(self, which):
        return self.groups[which], {name: x if x is None else x[which] for name, x in self.of.items()}

    def keep(self, which):
        self.groups, self.of = self.taken(which)
        self.later = self.later[which]


def products_of(machine) -> Products:
    if machine.products is None:
        machine.products = Products(machine)
    return machine.products


def groups_of(machine, mask):
    lanes = machine.chosen(mask)
    return lanes[::128] // 128


def lanes_of(groups):
    return (groups[:, None] * 128 + np.arange(128)).reshape(-1)


@instruction("wgmma")
def wgmma(machine, i):
    what = i.parts[1]
    if what == "fence":
        run = lambda mask: fence(machine, groups_of(machine, mask))  # noqa: E731
    elif what == "commit_group":
        run = lambda mask: commit(machine, groups_of(machine, mask))  # noqa: E731
    elif what == "wait_group":
        left = i.operands[0].value
        run = lambda mask: finish(machine, groups_of(machine, mask), left)  # noqa: E731
    else:
        run = Multiply(machine, i).issue
    return machine.warpwide(None, run, 128)


def fence(machine, groups):
    products, registers = products_of(machine), dict(machine.registers)
    for group in groups:
        products.fenced[group] = registers


def check_fenced(machine, products, groups, names, what):
    """Registers that others have written since the fence are not the product's to use (PTX ISA, "wgmma.fence")."""
    alike = {}
    for group in groups:
        if products.fenced[group] is None:
            raise Fault("no wgmma.fence before it")
        alike.setdefault(id(products.fenced[group]), []).append(group)
    for those in alike.values():
        fenced, lanes = products.fenced[those[0]], lanes_of(np.array(those))
        for name in names:
            now, then, own = machine.registers.get(name), fenced.get(name), products.written.get(name)
            if now is then or now is own:
                continue
            known = [machine.full(x)[lanes] for x in (then, own) if x is not None]
            if not known or not np.logical_or.reduce([machine.full(now)[lanes] == x for x in known]).all():
                raise Fault(f"{what} {name} has been written since wgmma.fence")


def commit(machine, groups):
    """wgmma.commit_group: a group of all that the warpgroup has issued and not yet committed."""
    for product in products_of(machine).issued:
        product.later[np.isin(product.groups, groups)] += 1


def finish(machine, groups, left):
    """wgmma.wait_group: at most the last `left` groups stay on their way."""
    products = products_of(machine)
    for product in products.issued:
        done = np.isin(product.groups, groups) & (product.later >= left)
        if done.any():
            product.what.complete(*product.taken(done))
            product.keep(~done)
    products.forget()


def ended(machine):
    if machine.products and machine.products.issued:
        raise Fault("wgmma: products that nobody has waited for")


class Multiply:
    """wgmma.mma_async."""

    def __init__(self, machine, i):
        shape = next(p for p in i.parts if p.startswith("m64n"))
        self.machine, self.n, self.k = machine, *(int(x) for x in shape[4:].split("k"))
        result, self.form_a, self.form_b = i.parts[i.parts.index(shape) + 1 :]
        self.size = SIZES[self.form_a]
        if result != "f32" or self.k * self.size != 32 or SIZES[self.form_b] != self.size:
            raise KeyError(i.name)
        if self.size > 1 and self.form_a != self.form_b or self.n % 8 or not 8 <= self.n <= 256:
            raise KeyError(i.name)
        self.sums = tuple(p.name for p in machine_parts(i.operands[0]))
        self.from_registers = hasattr(i.operands[1], "parts")
        if self.from_registers:
            self.a_names = tuple(p.name for p in i.operands[1].parts)
            self.a = [machine.reader(p, "u32") for p in i.operands[1].parts]
        else:
            self.a_names, self.a = (), machine.reader(i.operands[1], "u64")
        if len(self.sums) != self.n // 2 or self.from_registers and len(self.a) != 4:
            raise KeyError(i.name)
        self.b = machine.reader(i.operands[2], "u64")
        self.adds = machine.reader(i.operands[3], "pred")
        flags = [o.value for o in i.operands[4:]]
        if len(flags) != 2 + (self.size == 2) * (1 if self.from_registers else 2):
            raise KeyError(i.name)
        self.signs, turned = flags[:2], flags[2:] if self.size == 2 else (0, 0)
        if not set(self.signs) <= {1, -1} or not set(turned) <= {0, 1}:
            raise KeyError(i.name)
        self.turned_a, self.turned_b = (0, turned[0]) if self.from_registers else turned
        self.reads = [machine.reader(p, "f32") for p in machine_parts(i.operands[0])]
        self.writes = [machine.writer(p) for p in machine_parts(i.operands[0])]

    def issue(self, mask):
        machine, groups = self.machine, groups_of(self.machine, mask)
        products = products_of(machine)
        check_fenced(machine, products, groups, self.sums + self.a_names, "register")
        b = self.uniform(self.b(), groups, "descriptors of B")
        product = Product(
            self,
            groups,
            adds=self.uniform(self.adds(), groups, "scale-d"),
            b=b,
            right=self.load(groups, b, self.n, self.turned_b, "B"),
            a=None if self.from_registers else self.uniform(self.a(), groups, "descriptors of A"),
            left=None,
        )
        product.of["left"] = self.left(groups, product.of["a"])
        products.issued.append(product)
        sums = products.sums.setdefault(self.sums, Sums(products.groups, (64, self.n)))
        new = groups[sums.products[groups] == 0]
        if new.size:
            lanes = lanes_of(new)
            registers = np.stack([machine.full(read())[lanes] for read in self.reads], -1)
            sums.matrix[new] = to_matrix(registers.reshape(-1, 32, self.n // 2)).reshape(-1, 64, self.n)
            self.write(lanes, [np.full(len(lanes), SPOILT).view(np.float32)] * len(self.sums))
        sums.products[groups] += 1

    def uniform(self, value, groups, what):
        """What must be the same in all lanes of a warpgroup."""
        each = self.machine.full(value)[lanes_of(groups)].reshape(-1, 128)
        if (each != each[:, :1]).any():
            raise Fault(f"{what} that differ within a warpgroup")
        return each[:, 0]

    def left(self, groups, descriptors, before=None):
        if not self.from_registers:
            return self.load(groups, descriptors, 64, self.turned_a, "A", before)
        lanes = lanes_of(groups)
        now = np.stack([self.machine.full(read())[lanes].reshape(-1, 128) for read in self.a], -1)
        return unchanged(now, before, "A")

    def load(self, groups, descriptors, rows, turned, name, before=None):
        """What descriptors say of shared memory, which is to be what it was before, if that is given."""
        machine = self.machine
        at = addresses(descriptors, rows, self.k, self.size, turned)
        blocks = np.broadcast_to(machine.block[128 * groups].reshape(-1, 1, 1), at.shape)
        if before is None:
            check_shown(machine, blocks, at, self.size)
        content = unchanged(machine.shared.load(blocks, at, self.size), before, name)
        words = at[:, :: 4 // self.size] if turned else at[:, :, :: 4 // self.size]
        machine.shared.reads(blocks[:, :1, :1], words, 4, 128 * groups.reshape(-1, 1, 1), together=True)
        return content

    def complete(self, groups, of):
        machine, products = self.machine, products_of(self.machine)
        self.load(groups, of["b"], self.n, self.turned_b, "B", of["right"])
        self.left(groups, of["a"], of["left"])
        if self.from_registers:
            left = fragment_a(of["left"].reshape(-1, 32, 4), self.form_a).reshape(-1, 64, self.k)
        else:
            left = decoded(of["left"], self.form_a)
        product = left @ decoded(of["right"], self.form_b).swapaxes(1, 2) * (self.signs[0] * self.signs[1])
        sums = products.sums[self.sums]
        before = np.where(of["adds"].reshape(-1, 1, 1), sums.matrix[groups], np.float32(0)).astype(np.float64)
        sums.matrix[groups] = (before + product).astype(np.float32)
        sums.products[groups] -= 1
        last = groups[sums.products[groups] == 0]
        if not last.size:
            return
        lanes = lanes_of(last)
        for read in self.reads:
            if (machine.full(read())[lanes].view(np.uint32) != SPOILT).any():
                raise Fault("wgmma: sums have changed before the product was waited for")
        matrix = sums.matrix[last].reshape(-1, 16, self.n)
        parts = [part for at in range(0, self.n, 8) for part in from_matrix(matrix[:, :, at : at + 8])]
        self.write(lanes, [np.ascontiguousarray(part.reshape(-1)) for part in parts])

    def write(self, lanes, values):
        machine, whole = self.machine, len(lanes) == self.machine.lanes
        mask = None if whole else np.isin(machine.lane, lanes)
        for name, write, value in zip(self.sums, self.writes, values, strict=True):
            write(machine.spread(lanes, value), mask)
            products_of(machine).written[name] = machine.registers[name]


def unchanged(now, before, name):
    if before is not None and (now != before).any():
        raise Fault(f"wgmma: {name} has changed before the product was waited for")
    return now


def to_matrix(registers):
    """[warp, lane, n / 2] as [warp, 16, n]: registers 4 t to 4 t + 3 as of mma's D, for columns 8 t to 8 t + 7."""
    warps, _, count = registers.shape
    group, quad = np.arange(32) // 4, np.arange(32) % 4
    matrix = np.empty((warps, 16, 2 * count), np.float32)
    for r in range(count):
        matrix[:, group + 8 * (r >> 1 & 1), r // 4 * 8 + 2 * quad + (r & 1)] = registers[:, :, r]
    return matrix


def addresses(descriptors, rows, k, size, turned):
    """[group, rows, k]: where the elements lie in shared memory (PTX ISA, "Matrix Descriptor Format", "Canonical Layouts").

    Along k (K-major), of T elements of 16 bytes: ((8,m),(T,2k)):((1T,SBO),(1,LBO)), or swizzled in rows of S T
    ((8,m),(T,2k)):((S T,SBO),(1,T)), whose leading offset means nothing. Along the rows (MN-major):
    ((T,1,m),(8,k)):((1,T,SBO),(1T,LBO)), or swizzled ((T,S,m),(8,k)):((1,T,LBO),(S T,SBO)).
    """
    if (descriptors & RESERVED).any():
        raise Fault("a descriptor with bits that mean nothing")
    d = descriptors.astype(np.int64).reshape(-1, 1, 1)
    start, leading, stride = (16 * (d >> by & 0x3FFF) for by in (0, 16, 32))
    mode = int(descriptors[0] >> np.uint64(62))
    if (descriptors >> np.uint64(62) != np.uint64(mode)).any() or (d >> 49 & 7).any():
        raise Fault("descriptors of several kinds, or with a base offset")
    span = SPANS[mode]
    row, column = np.arange(rows)[:, None], np.arange(k)[None, :]
    along, across = (row * size, column) if turned else (column * size, row)
    inside, unit, eight = along % span + across % 8 * span, along // span, across // 8
    if turned:
        by_unit, by_eight = (stride, leading) if mode == 0 else (leading, stride)
    else:
        by_unit, by_eight = (leading, stride)
    at = start + inside + unit * by_unit + eight * by_eight
    if mode:  # bits 4 and on are exchanged by those from bit 7 on: Swizzle<1 to 3, 4, 3>
        at = at ^ (at >> 7 & (span // 16 - 1)) << 4
    return at


def decoded(words, form):
    if form in ("bf16", "f16"):
        return values16(words, form)
    if form == "tf32":
        return FORMS["tf32"][1](words)[..., 0]
    return small_values(words, form)
