"""Barriers in shared memory, bulk copies, and when what is asynchronous happens (PTX ISA, "mbarrier", "cp.async.bulk").

Bulk copies, the tensor cores' products and what is committed to barriers happen as late as they may: only when no thread can
go on without. Of those that nothing orders, chance picks the next one. Where a number draws the order of threads (Machine.next)
they also happen in between: then a thread may be late instead.
"""

import numpy as np

from tests.machine.machine import WAIT, instruction
from tests.machine.memory import REMOTE, Fault
from tests.machine.parse import Symbol
from tests.machine.tensor_map import decoded

MOST_BYTES = (1 << 20) - 1  # "Tracking asynchronous operations by the mbarrier object", range of tx-count
MOST_ARRIVALS = (1 << 20) - 1  # "Contents of the mbarrier object"


class Barrier:
    """An mbarrier object: of the phase that is on its way, the arrivals and bytes that it still waits for."""

    def __init__(self, count: int):
        self.count, self.pending, self.phase, self.bytes = count, count, 0, 0

    def arrive(self, count: int) -> None:
        if count > self.pending:
            raise Fault(f"{count} arrive where {self.pending} are pending")
        self.pending -= count

    def expect(self, count: int) -> None:
        self.bytes += count
        if abs(self.bytes) > MOST_BYTES:
            raise Fault(f"a barrier that waits for {self.bytes} bytes")


class Operation:
    """Something asynchronous: what it does, and what of the same kind must have been done before it."""

    def __init__(self, machine, lane: int, kind: str, run, key=None):
        self.block, self.lane, self.kind, self.run, self.key = int(machine.block[lane]), int(lane), kind, run, key
        self.where = machine.where()

    def waits_for(self, earlier: "Operation") -> bool:
        """Whether an earlier one of the same block comes first (PTX ISA, tcgen05, "Pipelined Instructions", "tcgen05.commit"):
        copies to tensor memory before products, products before those that add to the same sums, all before a commit."""
        if self.kind == "bulk" or earlier.kind == "bulk" or self.lane != earlier.lane:
            return False
        if self.kind == "product":
            return earlier.kind == "copy" or earlier.kind == "product" and earlier.key == self.key
        return self.kind == "commit" and earlier.kind != "commit"


def begin(machine, lane, kind, run, key=None) -> None:
    operation = Operation(machine, lane, kind, run, key)
    machine.asynchronous.setdefault(operation.block, []).append(operation)


def advance(machine, early: bool = False) -> bool:
    """Of each block that waits, or of all, one of the operations that may be next; whether there was any."""
    moved = False
    for block in list(machine.asynchronous) if early else np.unique(machine.block[machine.state == WAIT]):
        operations = machine.asynchronous.get(int(block), [])
        free = [o for k, o in enumerate(operations) if not any(map(o.waits_for, operations[:k]))]
        if free:
            perform(operations, free[machine.chance.integers(len(free))])
            moved = True
    return moved


def perform(operations, operation) -> None:
    operations.remove(operation)
    try:
        operation.run()
    except Fault as error:
        raise Fault(f"{operation.where}: {error}") from error


def ended(machine) -> None:
    """At the end of a launch what is still on its way can only be arrivals for which nobody waits."""
    for operations in machine.asynchronous.values():
        while operations:
            if operations[0].kind != "commit":
                raise Fault(f"{operations[0].where}: on its way when its block has ended")
            perform(operations, operations[0])


# Barriers


def keys(machine, lanes, addresses) -> np.ndarray:
    """Which barrier each lane means: its block << 32 | its address there."""
    addresses = addresses.astype(np.int64)
    if (addresses % 8).any():
        raise Fault("a barrier at no multiple of 8")
    block, rank, cluster = machine.block[lanes], addresses >> REMOTE, machine.kernel.cluster
    if rank.size and int(rank.max()) > cluster:
        raise Fault(f"a block of rank {int(rank.max()) - 1} in a cluster of {cluster}")
    block = np.where(rank > 0, block // cluster * cluster + rank - 1, block)
    return block.astype(np.int64) << 32 | addresses & (1 << REMOTE) - 1


def barrier(machine, key) -> Barrier:
    found = machine.barriers.get(int(key))
    if found is None:
        raise Fault(f"no barrier at {int(key) & 0xFFFFFFFF:#x} of block {int(key) >> 32}")
    return found


def settle(machine, found: Barrier) -> None:
    """End the phase if nothing is missing."""
    if found.pending == 0 and found.bytes == 0:
        found.phase += 1
        found.pending = found.count
        machine.retry(WAIT)


def bytes_came(machine, key, count: int) -> None:
    found = barrier(machine, key)
    found.expect(-count)
    settle(machine, found)


def arrived(machine, key) -> None:
    found = barrier(machine, key)
    found.arrive(1)
    settle(machine, found)


@instruction("mbarrier")
def mbarrier(machine, i):
    what = i.parts[1]
    if i.parts[-1] != "b64" or "noComplete" in i.parts:
        raise KeyError(i.name)
    return {
        "init": init, "inval": invalidate, "arrive": arrive, "expect_tx": expect, "complete_tx": expect,
        "test_wait": wait, "try_wait": wait,
    }[what](machine, i)  # fmt: skip


def place(machine, operand):
    """A function of lanes that gives the barriers they mean; of a shared address, not a generic one."""
    address = machine.address(operand, 4)
    return lambda chosen: keys(machine, chosen, address()[chosen])


def init(machine, i):
    where, count = place(machine, i.operands[0]), machine.reader(i.operands[1], "u32")

    def run(mask):
        chosen = machine.chosen(mask)
        for key, given in zip(where(chosen), machine.full(count())[chosen], strict=True):
            if int(key) in machine.barriers:
                raise Fault("a barrier where there is one")
            if not 0 < int(given) <= MOST_ARRIVALS:
                raise Fault(f"a barrier for {given} arrivals")
            machine.barriers[int(key)] = Barrier(int(given))

    return run


def invalidate(machine, i):
    where = place(machine, i.operands[0])

    def run(mask):
        chosen = machine.chosen(mask)
        for key in where(chosen):
            found = barrier(machine, key)
            if found.bytes or any(o.key == int(key) for o in machine.asynchronous.get(int(key) >> 32, [])):
                raise Fault("a barrier that something on its way would arrive at")
            del machine.barriers[int(key)]

    return run


def arrive(machine, i):
    """Arrivals of all lanes, one after the other; .expect_tx comes before its arrival."""
    writes = machine.writer(i.operands[0]) if not isinstance(i.operands[0], Symbol) else None
    where = place(machine, i.operands[1])
    expects = "expect_tx" in i.parts
    given = machine.reader(i.operands[2], "u32") if len(i.operands) > 2 else lambda: np.uint32(1)

    def run(mask):
        chosen = machine.chosen(mask)
        if machine.tensor_memory is not None:
            machine.tensor_memory.tell(machine, chosen)
        numbers = machine.full(given())[chosen]
        phases = np.zeros(len(chosen), np.uint64)
        for k, key in enumerate(where(chosen)):
            found = barrier(machine, key)
            phases[k] = found.phase
            if expects:
                found.expect(int(numbers[k]))
            found.arrive(1 if expects else int(numbers[k]))
            settle(machine, found)
        if writes:
            writes(machine.spread(chosen, phases), mask)

    return run


def expect(machine, i):
    where, given = place(machine, i.operands[0]), machine.reader(i.operands[1], "u32")
    sign = 1 if i.parts[1] == "expect_tx" else -1

    def run(mask):
        chosen = machine.chosen(mask)
        for key, count in zip(where(chosen), machine.full(given())[chosen], strict=True):
            found = barrier(machine, key)
            found.expect(sign * int(count))
            settle(machine, found)

    return run


def wait(machine, i):
    """Whether the phase has ended that has this parity, or that an arrival's state names. try_wait waits until it has: it
    may give up after a while, which a loop around it hides."""
    write, where = machine.writer(i.operands[0]), place(machine, i.operands[1])
    by_parity = "parity" in i.parts
    given = machine.reader(i.operands[2], "u32" if by_parity else "u64")

    def run(mask):
        chosen = machine.chosen(mask)
        found, back = np.unique(where(chosen), return_inverse=True)
        phases = np.array([barrier(machine, key).phase for key in found], np.int64)[back]
        named = machine.full(given())[chosen].astype(np.int64)
        if by_parity and len(named) and int(named.max()) > 1:
            raise Fault(f"parity {named.max()}")
        over = phases & 1 != named if by_parity else phases > named
        write(machine.spread(chosen, over), mask)
        if machine.tensor_memory is not None:
            machine.tensor_memory.meet(chosen[over])
        if over.all():
            return None
        if i.parts[1] == "test_wait":
            if not advance(machine):
                raise Fault("a phase that cannot end")
            return None
        stay = np.zeros(machine.lanes, bool)
        stay[chosen[~over]] = True
        machine.state[stay] = WAIT
        return "wait", stay

    return run


# Bulk copies


def bulk(machine, i):
    """cp.async.bulk from global memory to shared memory, its bytes counted at a barrier."""
    if i.parts[2] != "bulk" or "mbarrier::complete_tx::bytes" not in i.parts or "global" not in i.parts:
        raise KeyError(i.name)
    known = {"cp", "async", "bulk", "tensor", "2d", "tile", "global", "mbarrier::complete_tx::bytes"}
    if rest := [p for p in i.parts if p not in known and p not in ("shared::cluster", "shared::cta")]:
        raise KeyError(rest[0])
    return (box if "tensor" in i.parts else contiguous)(machine, i)


def contiguous(machine, i):
    to, source, size = machine.address(i.operands[0], 4), machine.address(i.operands[1]), i.operands[2]
    count, where = machine.reader(size, "u32"), place(machine, i.operands[3])

    def run(mask):
        chosen = machine.chosen(mask)
        targets, sources, sizes = to()[chosen], source()[chosen], machine.full(count())[chosen]
        if (targets % 16).any() or (sources % 16).any() or (sizes % 16).any():
            raise Fault("a bulk copy that is not in 16 bytes")
        for lane, target, first, n, key in zip(chosen, targets, sources, sizes, where(chosen), strict=True):
            steps = np.arange(0, int(n), 8, dtype=np.uint64)

            def carry(lane=lane, target=target, first=first, steps=steps, n=int(n), key=int(key)):
                put(machine, lane, np.uint32(target) + steps.astype(np.uint32), machine.memory.load(first + steps, 8))
                bytes_came(machine, key, n)

            announce(machine, lane, target, int(n))
            begin(machine, lane, "bulk", carry, int(key))

    return run


def box(machine, i):
    """A box of a matrix that a tensor map describes; what lies outside comes as zero, and counts (PTX ISA, "Tensors")."""
    if "2d" not in i.parts:
        raise KeyError(i.name)
    to, source, where = machine.address(i.operands[0], 4), machine.address(i.operands[1]), place(machine, i.operands[2])
    x, y = (machine.reader(c, "s32") for c in i.operands[1].coordinates)

    def run(mask):
        chosen = machine.chosen(mask)
        xs, ys = (machine.full(read())[chosen] for read in (x, y))
        for lane, target, at, left, top, key in zip(
            chosen, to()[chosen], source()[chosen], xs, ys, where(chosen), strict=True
        ):
            tensor = decoded(machine, at)

            def carry(lane=lane, target=target, left=left, top=top, key=int(key), tensor=tensor):
                content = tensor.box(machine.memory, int(left), int(top))  # [rows, bytes]
                rows, width = content.shape
                words = np.ascontiguousarray(content).view(np.uint64)
                addresses = int(target) + np.arange(rows)[:, None] * width + np.arange(0, width, 8)
                put(machine, lane, tensor.swizzled(addresses).astype(np.uint32), words)
                bytes_came(machine, key, rows * width)

            tensor.check(int(target))
            announce(machine, lane, target, tensor.box_rows * tensor.box_width)
            begin(machine, lane, "bulk", carry, int(key))

    return run


def announce(machine, lane, target, count) -> None:
    """From its issue on a bulk copy may write: what is read there without an order is a hazard."""
    at = np.uint32(target) + np.arange(0, count, 8, dtype=np.uint32)
    machine.shared.will_be_written(machine.block[lane], at, 8, lane)


def put(machine, lane, addresses, words) -> None:
    """Store to shared memory as the asynchronous units do."""
    addresses, words = addresses.reshape(-1), words.reshape(-1)
    blocks = np.full(addresses.shape, machine.block[lane])
    machine.shared.views[words.itemsize][machine.shared.index(blocks, addresses, words.itemsize)] = words


@instruction("fence")
def fence(machine, i):
    """All is visible at once here, to everybody but the asynchronous units: what threads have stored to shared memory those
    see from a proxy fence on (PTX ISA, "membar, fence")."""
    if i.parts[1:3] != ["proxy", "async"]:
        return lambda mask: None

    def run(mask):
        machine.shared.show(np.unique(machine.block[machine.chosen(mask)]))

    return run


def check_shown(machine, blocks, addresses, width) -> None:
    if machine.shared.hidden(blocks, addresses, width):
        raise Fault("shared memory that threads have stored to, with no fence.proxy.async since")
