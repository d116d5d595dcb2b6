"""Lanes and blocks: one launch of a kernel, all of its threads at once, a register an array with an element a thread.

Threads may part ways: those that stand lowest in the program go first, and those that share a place go together, until a label
where others may join them. A barrier, a warp's instruction and a wait hold who reaches them until the others are there; when
nobody can go on, the launch has a deadlock, and says so.
"""

import numpy as np

from tests.machine.memory import CONSTANT_WINDOW, Fault, Memory, Shared, tensors_at
from tests.machine.parse import Address, Immediate, Kernel, Register, Symbol
from tests.machine.races import Races

WORDS = {0: np.bool_, 1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {"pred": np.bool_, "f32": np.float32, "f64": np.float64}
TYPES |= {f"{kind}{8 * size}": WORDS[size] for kind in "bu" for size in (1, 2, 4, 8)}
TYPES |= {"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "f16": np.uint16, "bf16": np.uint16}
TYPES |= {"f16x2": np.uint32, "bf16x2": np.uint32, "e4m3x2": np.uint16, "e5m2x2": np.uint16, "e2m1x2": np.uint8}
TYPES |= {"s16x2": np.uint32, "u16x2": np.uint32, "f32x2": np.uint64}
TYPES |= {"ue8m0x2": np.uint16, "e2m1x4": np.uint16, "e4m3x4": np.uint32, "tf32": np.uint32}
READY, BARRIER, WARP, WAIT, CLUSTER, DONE = range(6)

# name of an instruction without its modifiers -> function(machine, instruction) that gives function(mask)
INSTRUCTIONS = {}


def instruction(*names):
    """Marks the maker of the functions that execute instructions of these names. It is given the machine and the instruction
    and returns what executes it for the lanes of a mask, or of None: all."""

    def mark(maker):
        INSTRUCTIONS.update((name, maker) for name in names)
        return maker

    return mark


class Machine:
    def __init__(
        self,
        kernel: Kernel,
        grid,
        threads: int,
        dynamic_shared: int,
        parameters: bytes,
        tensors,
        races=True,
        order=None,
        contract=False,
    ):
        if contract:
            kernel = contraction.contracted(kernel)
        self.kernel, self.grid, self.threads = kernel, tuple(grid), threads
        self.blocks = int(np.prod(grid))
        self.lanes = self.blocks * threads
        self.lane = np.arange(self.lanes)
        self.block = self.lane // threads
        self.warps_a_block = -(-threads // 32)
        # warps are rows of 32; a block whose threads are no multiple of 32 is not a shape that these kernels have
        if threads % 32:
            raise Fault(f"{threads} threads")
        self.symbols, constants, at = {}, b"", 0
        for v in sorted(kernel.variables, key=lambda v: (v.size == 0, v.name)):
            if v.space == "shared":
                at = -(-at // max(v.align, 16)) * max(v.align, 16)
                self.symbols[v.name] = at
                at += v.size
            else:
                constants = constants.ljust(-(-len(constants) // 16) * 16, b"\0")
                self.symbols[v.name] = CONSTANT_WINDOW + len(constants)
                constants += v.content.ljust(v.size, b"\0")
        self.parameters = parameters
        self.memory = Memory(tensors, parameters, constants)
        self.shared = Shared(self.blocks, at + dynamic_shared, kernel.cluster)
        if races and self.shared.size:
            self.shared.races = Races(self, self.shared.content.size, narrowest(kernel), races == "strict")
        self.order, self.turn = order, 0
        self.random = np.random.default_rng(order) if isinstance(order, int) else None
        self.ahead = np.ones(self.lanes, bool)
        self.registers = {}
        self.at = 0  # the instruction that is executed
        self.arrivals, self.waits = np.zeros((2, self.lanes), np.int64)  # at the cluster's barrier
        self.pc = np.zeros(self.lanes, np.int64)
        self.state = np.zeros(self.lanes, np.int8)
        self.barrier = np.zeros(self.lanes, np.int64)  # which one a lane waits at
        self.expected = np.zeros(self.lanes, np.int64)  # and how many threads that waits for
        self.copies, self.products = [], None  # asynchronous: of cp.async (what to do, lanes, group of each), of wgmma
        self.copy_groups = np.zeros(self.lanes, np.int64)
        self.barriers = {}  # of shared memory: block << 32 | address -> Barrier
        self.asynchronous = {}  # by block: operations that have been issued and not yet happened
        self.chance = np.random.default_rng(order if isinstance(order, int) else 0)  # which of them is next
        self.tensor_memory = None  # once somebody allocates
        self.special = self.specials()
        targets = {i.operands[0].name for i in kernel.instructions if i.name.split(".")[0] == "bra"}
        self.joins = {kernel.labels[name] for name in targets}
        self.program = [None] * len(kernel.instructions)  # what executes each, made when it is first reached
        self.names = [i.name for i in kernel.instructions]

    def specials(self):
        x, y, z = self.grid
        u32 = lambda v: np.asarray(v).astype(np.uint32)  # noqa: E731
        rank = self.block % self.kernel.cluster
        found = {
            "%tid.x": u32(self.lane % self.threads), "%ntid.x": u32(self.threads),
            "%ctaid.x": u32(self.block % x), "%ctaid.y": u32(self.block // x % y), "%ctaid.z": u32(self.block // (x * y)),
            "%nctaid.x": u32(x), "%nctaid.y": u32(y), "%nctaid.z": u32(z),
            "%laneid": u32(self.lane % 32), "%warpid": u32(self.lane % self.threads // 32), "%nwarpid": u32(self.warps_a_block),
            "%cluster_ctarank": u32(rank), "%cluster_ctaid.x": u32(rank), "%cluster_nctarank": u32(self.kernel.cluster),
            "%cluster_nctaid.x": u32(self.kernel.cluster), "%clusterid.x": u32(self.block % x // self.kernel.cluster),
            "%nclusterid.x": u32(x // self.kernel.cluster),
        }  # fmt: skip
        for name in ("%tid.y", "%tid.z", "%cluster_ctaid.y", "%cluster_ctaid.z"):
            found[name] = u32(0)
        for name in ("%ntid.y", "%ntid.z", "%cluster_nctaid.y", "%cluster_nctaid.z"):
            found[name] = u32(1)
        return found

    # Operands

    def reader(self, operand, kind: str):
        """A function that gives an operand's value as elements of a type such as "s32": an array, or one element for all."""
        dtype = TYPES[kind]
        size = np.dtype(dtype).itemsize
        if isinstance(operand, Immediate):
            constant = self.constant(operand, dtype)
            return lambda: constant
        if isinstance(operand, Symbol):
            if operand.name in self.special:
                value = self.special[operand.name].astype(WORDS[size]).view(dtype)
            else:
                value = np.array(self.symbols[operand.name], WORDS[size]).view(dtype)
            return lambda: value
        if not isinstance(operand, Register):
            raise Fault(f"an operand that is not understood: {operand}")
        name, registers, missing = operand.name, self.registers, self.unwritten(operand.name)
        if operand.negated:
            return lambda: ~registers.get(name, missing)
        if kind == "pred" or self.width(name) == size and dtype is WORDS[size]:
            return lambda: registers.get(name, missing)
        if self.width(name) == size:
            return lambda: registers.get(name, missing).view(dtype)
        return lambda: registers.get(name, missing).astype(WORDS[size]).view(dtype)

    @staticmethod
    def constant(operand: Immediate, dtype):
        size = np.dtype(dtype).itemsize
        if dtype is np.bool_:
            return np.array(bool(operand.value))
        if operand.width == 0 and np.dtype(dtype).kind == "f":
            raise Fault("an integer where a floating-point constant belongs")
        bits = operand.value & (1 << 8 * size) - 1
        if operand.width == 8 and size == 4:  # fp64's form of an fp32 constant
            bits = int(np.array(operand.value, np.uint64).view(np.float64).astype(np.float32).view(np.uint32))
        return np.array(bits, WORDS[size]).view(dtype)

    def width(self, name: str) -> int:
        kernel = self.kernel
        return kernel.widths[name] if name in kernel.widths else kernel.prefixes[name.rstrip("0123456789")]

    def unwritten(self, name: str):
        """What a register holds that nobody has written."""
        size = self.width(name)
        return np.array(False) if size == 0 else np.array(0xBADC0DE5BADC0DE5 & (1 << 8 * size) - 1, WORDS[size])

    def writer(self, operand):
        """A function (value, mask) that writes a register; a value narrower than it is extended by its own sign."""
        if isinstance(operand, Symbol) and operand.name == "_":
            return lambda value, mask: None
        name, registers, missing = operand.name, self.registers, self.unwritten(operand.name)
        size = self.width(name)
        word = WORDS[size]

        def write(value, mask):
            value = np.asarray(value)
            if value.dtype != word:
                if size and value.dtype.itemsize == size:
                    value = value.view(word)
                elif size and value.dtype.kind == "i":
                    value = value.astype(f"i{size}").view(word)
                else:
                    value = value.astype(word)
            registers[name] = value if mask is None else np.where(mask, value, registers.get(name, missing))

        return write

    def address(self, operand: Address, size: int = 8):
        """A function that gives what [base + offset] says, as an unsigned integer of `size` bytes for each lane."""
        offset = np.array(operand.offset & (1 << 8 * size) - 1, WORDS[size])
        base = (
            self.reader(operand.base, f"u{8 * size}") if operand.base is not None else lambda: np.array(0, WORDS[size])
        )
        lanes = (self.lanes,)
        return lambda: np.broadcast_to(base() + offset, lanes)

    def full(self, value):
        """A value for all as one for each lane."""
        return np.broadcast_to(value, (self.lanes,))

    def chosen(self, mask):
        return self.lane if mask is None else np.flatnonzero(mask)

    def spread(self, chosen, values):
        """Of values for some lanes, an array for all."""
        if len(chosen) == self.lanes:
            return values
        out = np.zeros(self.lanes, values.dtype)
        out[chosen] = values
        return out

    # Execution

    def made(self, i):
        """What executes an instruction: a function of the mask that may return a control, a tuple."""
        base = i.name.split(".")[0]
        if base not in INSTRUCTIONS:
            raise Fault(f"line {i.line}: no such instruction here: {i.name}")
        try:
            run = INSTRUCTIONS[base](self, i)
        except (KeyError, IndexError, ValueError, Fault) as error:
            raise Fault(f"line {i.line}: {i.name}: {error!r}") from error
        if base == "mbarrier" and any("wait" in part for part in i.parts) and self.shared.races:
            run = self.after_all(run)
        if i.guard is None or base == "bra":
            return run
        guard = self.reader(i.guard, "pred")

        def guarded(mask):
            held = self.full(guard())
            held = held if mask is None else held & mask
            if held.any():
                return run(None if held.all() else held)

        return guarded

    def after_all(self, run):
        """Who waited at an mbarrier comes after whoever arrived there, which may be anybody."""

        def waited(mask):
            self.shared.races.came_after_all(self.chosen(mask))
            return run(mask)

        return waited

    def run(self):
        with np.errstate(all="ignore"):
            while not self.finished():
                self.go()

    def finished(self):
        while not (self.state == READY).any():
            if (self.state == DONE).all():
                barriers.ended(self)
                tensor_memory.ended(self)
                wgmma.ended(self)
                return True
            if not barriers.advance(self):
                self.complain()
        return False

    def complain(self):
        stuck = np.flatnonzero(self.state != DONE)
        places = sorted(
            {f"{self.kernel.instructions[max(self.pc[k], 0)].name}" for k in stuck[:: max(1, len(stuck) // 64)]}
        )
        raise Fault(f"deadlock: {len(stuck)} threads wait for ever, at {', '.join(places)}")

    def where(self) -> str:
        return f"line {self.kernel.instructions[self.at].line}: {self.names[self.at]}"

    def go(self):
        """Lanes at one place, until they branch, wait or reach a place where others may join."""
        if self.random is not None and self.asynchronous and self.random.random() < 0.5:
            barriers.advance(self, early=True)
        at, mask, steps = self.next()
        whole = bool(mask.all())
        program, mask_given = self.program, None if whole else mask
        while True:
            self.at = at
            if at < len(program) and program[at] is None:
                program[at] = self.made(self.kernel.instructions[at])
            try:
                control = program[at](mask_given) if at < len(program) else ("exit", None)
            except (Fault, KeyError) as error:
                raise Fault(f"{self.where()}: {error}") from error
            at += 1
            if control is not None:
                break
            steps -= 1
            if not whole and (at in self.joins or steps == 0):
                self.pc[mask] = at
                return
        what, who = control
        if what == "branch":
            target, taken = who
            if taken is None:
                self.pc[mask] = target
            else:
                self.pc[mask] = np.where(taken, target, at)[mask]
        elif what == "exit":
            self.state[mask if who is None else who] = DONE
            self.pc[mask] = at
            self.release()
        elif what == "wait":  # some stay where they are, with a state that says why; the others go on
            self.pc[mask & ~who] = at
            self.pc[who] = at - 1
        elif what == "barrier":  # they go on from here once it is complete
            self.pc[mask] = at
            self.release()

    def next(self):
        """Where to go on, with whom, and for how many instructions at most (0: no matter how many).

        In order of the program, in order "backward" those that stand highest first, or in an order that a number draws: at any
        place some of the warps there, for a while. Now and then others have a turn, should they be what the first wait for.
        Of a cluster some blocks, drawn too, run ahead of the others.
        """
        ready = self.state == READY
        self.turn += 1
        if self.random is None and self.turn % 1024:
            at = int(self.pc[ready].max() if self.order == "backward" else self.pc[ready].min())
            return at, ready & (self.pc == at), 0
        if self.random is not None and self.kernel.cluster > 1:
            if not (ready & self.ahead).any() or not self.turn % 256:
                self.ahead = np.repeat(self.random.random(self.blocks) < 0.5, self.threads)
            ready = ready & self.ahead if (ready & self.ahead).any() else ready
        places = np.unique(self.pc[ready])
        if self.random is None:
            at = int(places[self.turn // 1024 % len(places)])
            return at, ready & (self.pc == at), 0
        at = int(self.random.choice(places))
        mask = ready & (self.pc == at)
        warps = mask.reshape(-1, 32).any(1)
        drawn = warps & (self.random.random(len(warps)) < self.random.choice([0.1, 0.5, 1.0]))
        if drawn.any():
            mask &= np.repeat(drawn, 32)
        return at, mask, int(self.random.geometric(1 / 32))

    def release(self):
        """Let those go whose barrier is complete: all threads of the block that have not ended, or as many as it says."""
        waiting = self.state == BARRIER
        if waiting.any():
            by_block = lambda lanes: lanes.reshape(self.blocks, self.threads).sum(1)  # noqa: E731
            alive = by_block(self.state != DONE)
            for number in np.unique(self.barrier[waiting]):
                here = waiting & (self.barrier == number)
                needed = np.where(here, self.expected, 0).reshape(self.blocks, self.threads).max(1)
                full = by_block(here) >= np.where(needed > 0, needed, alive)
                met = here & full[self.block]
                self.state[met] = READY
                if met.any() and self.shared.races:
                    self.shared.races.met(met)
        self.retry(WARP)  # their warp may be whole without those that ended
        self.retry(CLUSTER)

    def retry(self, why: int) -> None:
        """Let those who wait where they are look again."""
        self.state[self.state == why] = READY

    def warpwide(self, members, run, size=32):
        """A warp's instruction as one that waits until all that its member masks name are there.

        members: a function that gives the mask, for each lane or for all; None of all `size`, which is 128 of a warpgroup.
        """
        bits = np.arange(32, dtype=np.uint32)

        def held(mask):
            if mask is None:
                return run(None)
            here = mask | (self.state == WARP) & (self.pc == self.at)
            rows = here.reshape(-1, size)
            alive = (self.state != DONE).reshape(-1, size)
            if members is None:
                named = alive
            else:
                each = self.full(members()).reshape(-1, 32, 1) >> bits & np.uint32(1) != 0
                if not each[:, range(32), range(32)][rows].all():
                    raise Fault("a lane that its own member mask leaves out")
                named = (each & rows[:, :, None]).any(1) & alive
            whole = (rows | ~named).all(1)
            may = (rows & whole[:, None]).reshape(-1)
            waits = here & ~may
            if may.any():
                run(None if may.all() else may)
            if not waits.any() and (may == mask).all():
                return None
            self.state[waits], self.pc[waits] = WARP, self.at
            self.state[may], self.pc[may] = READY, self.at + 1
            return "wait", waits

        return held


def narrowest(kernel):
    """The bytes of the smallest thing that a kernel's instructions load from shared memory or store there, 4 at most."""
    widths = [4]
    for i in kernel.instructions:
        if i.parts[0] in ("ld", "st", "atom", "red") and not {"global", "param", "local", "const"} & set(i.parts):
            widths.append(np.dtype(TYPES[i.parts[-1]]).itemsize)
    return min(widths)


def execute(kernel: Kernel, grid, threads: int, shared: int, parameters: bytes, tensors=None, **options) -> None:
    """Run a launch, which may touch these tensors, or those that its parameters point to.

    races: whether to look for hazards in shared memory, or "strict" (races.py); order: in which those go on that parted ways
    (Machine.next); contract: products and sums that may become one fma do (contraction.py).
    """
    tensors = tensors_at(parameters) if tensors is None else tensors
    Machine(kernel, (*grid, 1, 1)[:3], threads, shared, parameters, tensors, **options).run()


# these register their instructions
from tests.machine import (  # noqa: E402
    arithmetic,  # noqa: F401
    barriers,
    contraction,
    conversions,  # noqa: F401
    moves,  # noqa: F401
    tensor_cores,  # noqa: F401
    tensor_memory,
    wgmma,
)
