"""Moving data and meeting others: mov, ld, st, atomics, cp.async, ldmatrix, shuffles, votes, branches, barriers."""

import numpy as np

from tests.machine.machine import BARRIER, CLUSTER, DONE, TYPES, WORDS, instruction
from tests.machine.memory import PARAMETER_WINDOW, REMOTE, SHARED_WINDOW, Fault
from tests.machine.parse import Register, Symbol, Vector

UNDEFINED = np.uint32(0xBADC0DE5)
SPOILT = np.uint32(0xFFFFFFFF)  # NaN in every format
SPACES = ("global", "shared", "param", "local", "const")


def nothing(machine, i):
    return lambda mask: None


# Everything is visible at once here, to everybody.
instruction(
    "membar",
    "griddepcontrol",
    "prefetch",
    "createpolicy",
    "setmaxnreg",
    "nanosleep",
    "applypriority",
    "discard",
)(nothing)


@instruction("mov")
def mov(machine, i):
    target, source, kind = *i.operands, i.parts[-1]
    if isinstance(target, Vector):  # a word to its parts
        size = int(kind[1:]) // 8
        read = machine.reader(source, f"u{8 * size}")
        part = size // len(target.parts)
        writes = [machine.writer(p) for p in target.parts]

        def unpack(mask):
            word = read()
            for k, write in enumerate(writes):
                write((word >> WORDS[size](8 * part * k)).astype(WORDS[part]), mask)

        return unpack
    if isinstance(source, Vector):
        size = int(kind[1:]) // 8
        part = size // len(source.parts)
        reads = [machine.reader(p, f"u{8 * part}") for p in source.parts]
        write = machine.writer(target)

        def pack(mask):
            word = WORDS[size](0)
            for k, read in enumerate(reads):
                word = word | np.asarray(read()).astype(WORDS[size]) << WORDS[size](8 * part * k)
            write(word, mask)

        return pack
    if isinstance(source, Symbol) and source.name in machine.kernel.parameters:
        at = np.array(machine.kernel.parameters[source.name][0], np.uint64)
        write = machine.writer(target)
        return lambda mask: write(at, mask)
    read, write = machine.reader(source, kind), machine.writer(target)
    return lambda mask: write(read(), mask)


@instruction("cvta")
def cvta(machine, i):
    space = next(p.split("::")[0] for p in i.parts if p.split("::")[0] in SPACES)
    back = "to" in i.parts
    base = np.uint64({"global": 0, "const": 0, "shared": SHARED_WINDOW, "param": PARAMETER_WINDOW}[space])
    source = i.operands[1]
    if isinstance(source, Symbol) and source.name in machine.kernel.parameters:
        at = np.uint64(machine.kernel.parameters[source.name][0])
        read = lambda: at  # noqa: E731
    else:
        read = machine.reader(source, i.parts[-1])
    write = machine.writer(i.operands[0])
    return lambda mask: write(
        np.asarray(read()).astype(np.uint64) - base if back else np.asarray(read()).astype(np.uint64) + base, mask
    )


def space_of(i):
    return next((p.split("::")[0] for p in i.parts[1:] if p.split("::")[0] in SPACES), None)


def address_size(i, space):
    return 4 if space == "shared" else 8


def check_remote(machine, addresses, chosen):
    """Another block's memory is there once all of its threads have met the cluster's barrier, until all have ended."""
    rank = np.asarray(addresses).astype(np.int64) >> REMOTE
    if (
        machine.kernel.cluster == 1 or not rank.any() or rank.max() > machine.kernel.cluster
    ):  # the last is not even a place
        return
    chosen = chosen[rank > 0]
    blocks = np.unique(machine.block[chosen] // machine.kernel.cluster * machine.kernel.cluster + rank[rank > 0] - 1)
    mine = np.isin(machine.block, blocks)
    if (machine.arrivals[mine] == 0).any():
        raise Fault("the memory of a block that may not have begun")
    if (machine.state == DONE).reshape(-1, machine.threads).all(1)[blocks].any():
        raise Fault("the memory of a block that has ended")


def shared_or_global(machine, space, addresses, chosen, width, values=None, strong=False):
    """Load from addresses, or store values there; of generic addresses each to its own space. strong: with an order of its own,
    so that there is no hazard among such accesses."""
    if space is None:
        inside = (addresses >= np.uint64(SHARED_WINDOW)) & (addresses < np.uint64(PARAMETER_WINDOW))
        if inside.any() and not inside.all():
            raise Fault("addresses of two spaces in one instruction")
        space = "shared" if inside.any() else "global"
        if space == "shared":
            addresses = addresses - np.uint64(SHARED_WINDOW)
    if space == "shared":
        check_remote(machine, addresses, chosen)
        lanes = None if strong else chosen
        if strong and values is not None:
            machine.shared.change(machine.block[chosen], addresses, width, chosen)
        if values is None:
            return machine.shared.load(machine.block[chosen], addresses, width, lanes)
        return machine.shared.store(machine.block[chosen], addresses, values, lanes)
    if values is None:
        return machine.memory.load(addresses, width)
    return machine.memory.store(addresses, values)


def vector(i):
    return next((int(p[1:]) for p in i.parts if p in ("v2", "v4", "v8")), 1)


def is_strong(i):
    return bool({"volatile", "relaxed", "acquire", "release", "mmio"} & set(i.parts))


def check_alignment(addresses, width):
    if (addresses % addresses.dtype.type(width)).any():
        raise Fault(f"an address that is no multiple of {width}")


@instruction("ld", "ldu")
def load(machine, i):
    kind, count = i.parts[-1], vector(i)
    width = np.dtype(TYPES[kind]).itemsize
    targets = i.operands[0].parts if isinstance(i.operands[0], Vector) else (i.operands[0],)
    writes = [machine.writer(t) for t in targets]
    if len(writes) != count:
        raise KeyError(i.name)
    space, at = space_of(i), i.operands[1]
    if space == "param":
        if isinstance(at.base, Symbol):
            first, size = machine.kernel.parameters[at.base.name]
            first += at.offset
            content = machine.parameters[first : first + width * count]
            if at.offset + width * count > size:
                raise Fault(f"beyond parameter {at.base.name}")
            values = np.frombuffer(content, TYPES[kind])

            def constant(mask):
                for k, write in enumerate(writes):
                    write(values[k], mask)

            return constant
        address = machine.address(at)
        inner = lambda: address() + np.uint64(PARAMETER_WINDOW)  # noqa: E731
        space = "global"
    else:
        inner = machine.address(at, address_size(i, space))
    if space == "const":
        space = "global"
    strong = is_strong(i)

    def run(mask):
        addresses = inner()
        chosen = machine.chosen(mask)
        mine = addresses if mask is None else addresses[chosen]
        if count > 1:
            check_alignment(mine, width * count)
        for k, write in enumerate(writes):
            at = mine + mine.dtype.type(k * width)
            values = shared_or_global(machine, space, at, chosen, width, strong=strong).view(TYPES[kind])
            write(machine.spread(chosen, values), mask)

    return run


@instruction("st")
def store(machine, i):
    kind, count = i.parts[-1], vector(i)
    width = np.dtype(TYPES[kind]).itemsize
    sources = i.operands[1].parts if isinstance(i.operands[1], Vector) else (i.operands[1],)
    reads = [machine.reader(s, f"u{8 * width}") for s in sources]
    if len(reads) != count or {"async", "bulk"} & set(i.parts):
        raise KeyError(i.name)
    space, strong = space_of(i), is_strong(i)
    address = machine.address(i.operands[0], address_size(i, space))

    def run(mask):
        chosen = machine.chosen(mask)
        mine = address()[chosen]
        if count > 1:
            check_alignment(mine, width * count)
        for k, read in enumerate(reads):
            values = machine.full(read())[chosen]
            shared_or_global(machine, space, mine + mine.dtype.type(k * width), chosen, width, values, strong)

    return run


ATOMICS = {
    "add": lambda old, x: old + x, "min": min, "max": max, "and": lambda old, x: old & x, "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x, "exch": lambda old, x: x,
    "inc": lambda old, x: old * 0 if old >= x else old + old.dtype.type(1),
    "dec": lambda old, x: x if old == 0 or old > x else old - old.dtype.type(1),
}  # fmt: skip


@instruction("atom", "red")
def atomic(machine, i):
    """One lane after the other."""
    kind, gives = i.parts[-1], i.parts[0] == "atom"
    width = np.dtype(TYPES[kind]).itemsize
    what = next((p for p in i.parts[1:] if p in (*ATOMICS, "cas")), None)
    if what is None or {"async", "bulk"} & set(i.parts) or kind in ("f16", "bf16", "f16x2", "bf16x2") or vector(i) > 1:
        raise KeyError(i.name)
    operands = list(i.operands)
    write = machine.writer(operands.pop(0)) if gives else None
    space = space_of(i)
    address = machine.address(operands[0], address_size(i, space))
    reads = [machine.reader(o, kind) for o in operands[1:]]

    def run(mask):
        chosen = machine.chosen(mask)
        addresses = address()[chosen]
        given = [machine.full(read())[chosen] for read in reads]
        before = np.empty(len(chosen), TYPES[kind])
        for k in range(len(chosen)):
            place, lane = addresses[k : k + 1], chosen[k : k + 1]
            old = shared_or_global(machine, space, place, lane, width, strong=True).view(TYPES[kind])
            before[k] = old[0]
            if what == "cas":
                new = given[1][k] if old[0] == given[0][k] else old[0]
            else:
                new = ATOMICS[what](old[0], given[0][k])
            new = np.array([new], TYPES[kind]).view(WORDS[width])
            shared_or_global(machine, space, place, lane, width, new, strong=True)
        if write:
            write(machine.spread(chosen, before), mask)

    return run


# Asynchronous copies: done when they are waited for, so that what is read too early is still what it was.


@instruction("cp")
def copy(machine, i):
    if i.parts[1] != "async":
        raise KeyError(i.name)
    if i.parts[2] == "commit_group":
        return lambda mask: commit(machine, mask)
    if i.parts[2] in ("wait_group", "wait_all"):
        left = i.operands[0].value if i.parts[2] == "wait_group" else 0
        return lambda mask: finish_copies(machine, mask, left, i.parts[2] == "wait_all")
    if i.parts[2] not in ("cg", "ca"):
        from tests.machine.barriers import bulk

        return bulk(machine, i)
    to, source = machine.address(i.operands[0], 4), machine.address(i.operands[1])
    size = i.operands[2].value
    rest = i.operands[3 : -1 if "L2::cache_hint" in i.parts else None]
    ignore = (
        machine.reader(rest[0], "pred")
        if rest and isinstance(rest[0], Register) and machine.width(rest[0].name) == 0
        else None
    )
    count = machine.reader(rest[0], "u32") if rest and ignore is None else lambda: np.uint32(size)

    def run(mask):
        chosen = machine.chosen(mask)
        targets, sources = to()[chosen], source()[chosen]
        check_alignment(targets, size)
        wanted = machine.full(count())[chosen].astype(np.int64)
        if ignore is not None:
            wanted = np.where(machine.full(ignore())[chosen], 0, wanted)
        if len(wanted) and (wanted.max() > size or wanted.min() < 0):
            raise Fault(f"cp.async of {wanted.max()} of {size} bytes")
        check_alignment(sources[wanted > 0], size)
        machine.shared.will_be_written(machine.block[chosen], targets, size, chosen)
        for at in range(0, size, 4):  # from now on until the wait nobody knows what is there
            machine.shared.store(machine.block[chosen], targets + np.uint32(at), np.full(len(chosen), SPOILT))
        machine.copies.append([chosen, machine.copy_groups[chosen].copy(), targets, sources, wanted, size])

    return run


def commit(machine, mask):
    machine.copy_groups[machine.chosen(mask)] += 1


def finish_copies(machine, mask, left, everything):
    """Those of all groups of a lane but its last `left`."""
    waiting = np.zeros(machine.lanes, bool)
    waiting[machine.chosen(mask)] = True
    kept = []
    for chosen, group, targets, sources, wanted, size in machine.copies:
        done = waiting[chosen] & (everything | (group < machine.copy_groups[chosen] - left))
        if done.any():
            carry(machine, chosen[done], targets[done], sources[done], wanted[done], size)
        if not done.all():
            kept.append([x[~done] for x in (chosen, group, targets, sources, wanted)] + [size])
    machine.copies = kept


def carry(machine, lanes, targets, sources, wanted, size):
    for at in range(0, size, 4):
        values = np.zeros(len(lanes), np.uint32)
        whole = wanted >= at + 4
        values[whole] = machine.memory.load(sources[whole] + np.uint64(at), 4)
        for part in np.flatnonzero((wanted > at) & (wanted < at + 4)):  # the rest is zero
            for k in range(int(wanted[part]) - at):
                values[part] |= np.uint32(
                    machine.memory.load(sources[part : part + 1] + np.uint64(at + k), 1)[0]
                ) << np.uint32(8 * k)
        machine.shared.store(machine.block[lanes], targets + np.uint32(at), values, lanes)


@instruction("ldmatrix")
def ldmatrix(machine, i):
    """Matrix k of 8 rows of 16 bytes: its rows' addresses from lanes 8k on; lane 4g + q gets elements 2q, 2q + 1 of row g."""
    count = next(int(p[1:]) for p in i.parts if p in ("x1", "x2", "x4"))
    transposed = "trans" in i.parts
    if "m8n8" not in i.parts or i.parts[-1] != "b16":
        raise KeyError(i.name)
    address = machine.address(i.operands[1], 4)
    target = i.operands[0]
    writes = [machine.writer(p) for p in (target.parts if isinstance(target, Vector) else (target,))]

    def run(mask):
        chosen = machine.chosen(mask)
        warps = chosen.reshape(-1, 32)
        rows = address()[warps]
        for k, write in enumerate(writes):
            first = rows[:, 8 * k : 8 * k + 8]
            check_alignment(first, 16)
            at = first[:, :, None] + np.arange(0, 16, 2, dtype=np.uint32)
            blocks = np.broadcast_to(machine.block[warps[:, :1, None]], at.shape)
            machine.shared.reads(blocks[:, :, ::2], at[:, :, ::2], 4, warps[:, :1, None], together=True)
            matrix = machine.shared.load(blocks, at, 2).astype(np.uint32)  # [warp, row, column]
            if transposed:
                matrix = matrix.swapaxes(1, 2)
            words = matrix[:, :, 0::2] | matrix[:, :, 1::2] << np.uint32(16)
            write(machine.spread(chosen, words.reshape(-1)), mask)

    if count != len(writes):
        raise KeyError(i.name)
    return machine.warpwide(None, run)


@instruction("stmatrix")
def stmatrix(machine, i):
    """The inverse of ldmatrix."""
    transposed = "trans" in i.parts
    if "m8n8" not in i.parts or i.parts[-1] != "b16":
        raise KeyError(i.name)
    address = machine.address(i.operands[0], 4)
    sources = i.operands[1].parts if isinstance(i.operands[1], Vector) else (i.operands[1],)
    reads = [machine.reader(p, "u32") for p in sources]

    def run(mask):
        warps = machine.chosen(mask).reshape(-1, 32)
        rows = address()[warps]
        for k, read in enumerate(reads):
            first = rows[:, 8 * k : 8 * k + 8]
            check_alignment(first, 16)
            words = machine.full(read())[warps].reshape(-1, 8, 4)
            matrix = (
                np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], -1).reshape(-1, 8, 8).astype(np.uint16)
            )
            if transposed:
                matrix = matrix.swapaxes(1, 2)
            at = first[:, :, None] + np.arange(0, 16, 2, dtype=np.uint32)
            machine.shared.store(
                np.broadcast_to(machine.block[warps[:, :1, None]], at.shape),
                at,
                np.ascontiguousarray(matrix),
                warps[:, :1, None],
            )

    return machine.warpwide(None, run)


# Among the lanes of a warp


@instruction("shfl")
def shuffle(machine, i):
    how = i.parts[2]
    if how not in ("up", "down", "bfly", "idx") or i.parts[-1] != "b32":
        raise KeyError(i.name)
    source, amount, clamp = (machine.reader(o, "u32") for o in i.operands[1:4])
    members = machine.reader(i.operands[4], "u32")
    target = i.operands[0]
    targets = target.parts if isinstance(target, Vector) else (target,)
    writes = [machine.writer(t) for t in targets]
    lane = (machine.lane % 32).astype(np.int64)

    def run(mask):
        c = np.asarray(clamp()).astype(np.int64)
        limit, segment = c & 31, c >> 8 & 31
        most = lane & segment | limit & ~segment
        least = lane & segment
        b = np.asarray(amount()).astype(np.int64) & 31
        if how == "up":
            at = lane - b
            inside = at >= most  # of .up the clamp is the lower bound
        elif how == "down":
            at = lane + b
            inside = at <= most
        elif how == "bfly":
            at = lane ^ b
            inside = at <= most
        else:
            at = least | b & ~segment
            inside = at <= most
        at = np.where(inside, at, lane)
        # of a lane that is not here, or no member, comes nothing that is defined
        given = ballot(machine, np.ones(machine.lanes, bool), mask, members()) >> at.astype(np.uint32) & 1 != 0
        writes[0](np.where(given, machine.full(source())[machine.lane - lane + at], UNDEFINED), mask)
        if len(writes) > 1:
            writes[1](inside, mask)

    return machine.warpwide(members, run)


@instruction("redux")
def redux(machine, i):
    kind, what = i.parts[-1], i.parts[2]
    if "NaN" in i.parts or "abs" in i.parts:
        raise KeyError(i.name)
    read, write, members = (
        machine.reader(i.operands[1], kind),
        machine.writer(i.operands[0]),
        machine.reader(i.operands[2], "u32"),
    )
    join = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[what]
    if kind == "f32":
        join = {"min": np.fmin, "max": np.fmax}[what]

    def run(mask):
        chosen = machine.chosen(mask)
        if (machine.full(members())[chosen] != np.uint32(0xFFFFFFFF)).any():
            raise Fault("redux over a part of a warp")
        warps = machine.full(read())[chosen].reshape(-1, 32)
        write(machine.spread(chosen, np.repeat(join.reduce(warps, 1), 32).astype(TYPES[kind])), mask)

    return machine.warpwide(members, run)


def ballot(machine, held, mask, members):
    """The bits of a warp's lanes that are here, hold and are among the members that each lane names."""
    here = np.zeros(machine.lanes, bool)
    here[machine.chosen(mask)] = True
    bits = ((held & here).reshape(-1, 32).astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)
    return np.repeat(bits, 32) & members


@instruction("vote")
def vote(machine, i):
    how = i.parts[2]
    if how not in ("ballot", "any", "all"):
        raise KeyError(i.name)
    read, write = machine.reader(i.operands[1], "pred"), machine.writer(i.operands[0])
    members = machine.reader(i.operands[2], "u32")

    def run(mask):
        held = machine.full(read())
        bits = ballot(machine, held ^ (how == "all"), mask, members())  # all hold of whom none does not
        write(bits if how == "ballot" else (bits != 0) ^ (how == "all"), mask)

    return machine.warpwide(members, run)


@instruction("elect")
def elect(machine, i):
    write = [machine.writer(part) for part in i.operands[0].parts]
    members = machine.reader(i.operands[1], "u32")

    def run(mask):
        bits = ballot(machine, np.ones(machine.lanes, bool), mask, members())
        lowest = bits & -bits
        first = np.log2(np.maximum(lowest, 1)).astype(np.uint32)
        write[0](first, mask)
        write[1](machine.lane % 32 == first, mask)

    return machine.warpwide(members, run)


@instruction("activemask")
def activemask(machine, i):
    write = machine.writer(i.operands[0])

    def run(mask):
        here = np.zeros(machine.lanes, bool)
        here[machine.chosen(mask)] = True
        write(
            np.repeat(
                (here.reshape(-1, 32).astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32), 32
            ),
            mask,
        )

    return run


# Control


@instruction("bra")
def branch(machine, i):
    target = machine.kernel.labels[i.operands[0].name]
    if i.guard is None:
        return lambda mask: ("branch", (target, None))
    guard = machine.reader(i.guard, "pred")

    def run(mask):
        taken = machine.full(guard())
        among = taken if mask is None else taken[mask]
        if not among.any():
            return None
        return "branch", (target, None if among.all() else taken)

    return run


@instruction("ret", "exit")
def leave(machine, i):
    return lambda mask: ("exit", mask)


@instruction("trap")
def trap(machine, i):
    def run(mask):
        raise Fault("trap")

    return run


@instruction("bar", "barrier")
def bar(machine, i):
    if "cluster" in i.parts:
        return cluster_barrier(machine, i)
    if i.parts[1] == "warp":
        return machine.warpwide(machine.reader(i.operands[0], "u32"), lambda mask: warps_met(machine, mask))
    if i.parts[1] not in ("sync", "cta") or "red" in i.parts or "arrive" in i.parts:
        raise KeyError(i.name)
    number = machine.reader(i.operands[0], "u32")
    count = machine.reader(i.operands[1], "u32") if len(i.operands) > 1 else lambda: np.uint32(0)

    def run(mask):
        numbers, counts = machine.full(number()), machine.full(count())
        if machine.tensor_memory is not None:
            machine.tensor_memory.tell(machine, machine.chosen(mask))
            machine.tensor_memory.meet(machine.chosen(mask))
        if mask is None and (numbers == numbers[0]).all() and ((counts == 0) | (counts == machine.threads)).all():
            if machine.shared.races:
                machine.shared.races.all_met()
            return None
        chosen = machine.chosen(mask)
        machine.state[chosen] = BARRIER
        machine.barrier[chosen] = numbers[chosen]
        machine.expected[chosen] = counts[chosen]
        return "barrier", None

    return run


def warps_met(machine, mask):
    if machine.shared.races:
        machine.shared.races.met_in_warps(machine.chosen(mask))


def cluster_barrier(machine, i):
    """Each thread arrives, then waits for all that have not ended (PTX ISA, "barrier.cluster")."""
    lanes = machine.kernel.cluster * machine.threads
    arrives, waits = "arrive" in i.parts, "wait" in i.parts
    if arrives == waits:
        raise KeyError(i.name)

    def arrive(mask):
        here = machine.chosen(mask)
        if (machine.arrivals[here] != machine.waits[here]).any():
            raise Fault("an arrival at the cluster's barrier with no wait since the last")
        machine.arrivals[here] += 1
        machine.retry(CLUSTER)

    def wait(mask):
        here = machine.chosen(mask)
        if (machine.arrivals[here] == machine.waits[here]).any():
            raise Fault("a wait at the cluster's barrier without an arrival")
        seen = np.where(machine.state == DONE, np.iinfo(np.int64).max, machine.arrivals)
        ready = np.repeat(seen.reshape(-1, lanes).min(1), lanes) >= machine.arrivals
        stay = ~ready if mask is None else mask & ~ready
        passed = here[ready[here]]
        machine.waits[passed] += 1
        if machine.shared.races:
            machine.shared.races.came_after_all(passed)
        if not stay.any():
            return None
        machine.state[stay] = CLUSTER
        return "wait", stay

    return wait if waits else arrive


@instruction("mapa")
def mapa(machine, i):
    if i.parts[-1] != "u32":
        raise KeyError(i.name)
    read, rank, write = (
        machine.reader(i.operands[1], "u32"),
        machine.reader(i.operands[2], "u32"),
        machine.writer(i.operands[0]),
    )
    return lambda mask: write(
        read() & np.uint32((1 << REMOTE) - 1) | (rank() + np.uint32(1)) << np.uint32(REMOTE), mask
    )
