"""Hazards in shared memory: two threads of a block touch a place, one of them writes, and nothing orders the two.

Time is a number that every barrier raises. For each word there is who wrote last and when, and the last two warps that read
it; for each warp there is how much of every other warp's time it has come after (a vector clock), which the barriers raise:
bar.sync joins those who took part, bar.warp.sync the lanes of a warp. Who waits at an mbarrier or for a cluster comes after
everything so far, so that nothing is reported that may be right. Writes of what is there already harm nobody, and count only
to the strict, who find more where the numbers of a test are such, as many zeros are. Accesses to
other blocks of a cluster, and of units that are no thread, are not followed.
"""

import numpy as np

from tests.machine.memory import Fault

# An access's record: its time, whether other lanes of its warp did the same at once, the thread in its block
THREAD, TOGETHER, TIME = (1 << 10) - 1, 1 << 10, 11
LAST = 1 << 20


class Races:
    def __init__(self, machine, size: int, word: int, strict: bool = False):
        self.machine, self.word, self.strict = machine, word, strict
        lanes, warps = machine.lanes, machine.warps_a_block
        self.thread = (machine.lane % machine.threads).astype(np.int32)
        self.now = 1
        self.seen = np.ones(
            (machine.blocks * warps, warps), np.int32
        )  # what a warp has come after of each in its block
        self.synced = np.ones(lanes, np.int32)  # when a lane last met the others of its warp
        self.floor = np.full(lanes, 1 << TIME, np.int32)  # all before this a lane has come after
        self.writes, self.reads, self.others, self.atomics = (np.zeros(size // word, np.int32) for _ in range(4))
        self.atomic = False

    # Order

    def later(self):
        self.now += 1
        if self.now == LAST:  # what is known does not fit any longer
            for records in (self.writes, self.reads, self.others, self.atomics):
                records[:] = 0
            self.now = 1
            self.all_met()

    def all_met(self):
        """A barrier of all threads of every block."""
        self.later()
        self.seen[:] = self.synced[:] = self.now
        self.floor[:] = self.now << TIME

    def met(self, lanes):
        """A barrier that some lanes took part in, the blocks each for themselves."""
        m = self.machine
        self.later()
        took = lanes.reshape(-1, 32).any(1).reshape(m.blocks, -1)
        which = took.any(1)
        took = took[which]
        seen = self.seen.reshape(m.blocks, m.warps_a_block, -1)
        joined = np.where(took[:, :, None], seen[which], 0).max(1)
        joined = np.where(took, self.now, joined)
        seen[which] = np.where(took[:, :, None], joined[:, None, :], seen[which])
        self.synced[lanes] = self.now
        self.floor[:] = np.repeat(self.seen.min(1), 32) << TIME

    def met_in_warps(self, lanes):
        self.later()
        self.synced[lanes] = self.now

    def came_after_all(self, lanes):
        self.later()
        self.synced[lanes] = self.now
        self.seen[np.unique(lanes // 32)] = self.now
        self.floor[lanes] = self.now << TIME

    # Accesses

    def records(self, lanes):
        return self.thread[lanes] + np.int32(self.now << TIME)

    def words(self, at, width, lanes):
        """The words of accesses at these bytes, and the lane of each."""
        if width <= self.word:
            return at // self.word, lanes
        parts = np.arange(width // self.word)
        return (at[:, None] // self.word + parts).ravel(), np.repeat(lanes, len(parts))

    def check(self, records, words, lanes, what, among=None):
        suspect = (records >= self.floor[lanes]) & ((records ^ self.thread[lanes]) & THREAD != 0)
        if among is not None:
            suspect &= among
        if not suspect.any():
            return
        k = np.flatnonzero(suspect)
        time, other, lane = records[k] >> TIME, records[k] & THREAD, lanes[k]
        inside = other >> 5 == self.thread[lane] >> 5
        after = np.where(inside, self.synced[lane], self.seen[lane // 32, other >> 5])
        if (bad := np.flatnonzero((time >= after) & ~(inside & (records[k] & TOGETHER != 0)))).size:
            n = bad[0]
            address = int(words[k[n]]) * self.word % self.machine.shared.size
            raise Fault(
                f"hazard: thread {self.thread[lane[n]]} of block {self.machine.block[lane[n]]} {what} by thread {other[n]}"
                f" at shared address {address:#x}, and no barrier between"
            )

    def read(self, at, width, lanes, together=False):
        words, lanes = self.words(at, width, lanes)
        self.check(self.writes[words], words, lanes, "reads what was written")
        if self.atomic:
            self.check(self.atomics[words], words, lanes, "reads what was changed")
        records, old = self.records(lanes) | TOGETHER * together, self.reads[words]
        moved = ((old ^ records) & THREAD) >> 5 != 0  # another warp's
        moved &= old >= self.floor[lanes]  # that still counts
        if moved.any():
            self.others[words[moved]] = old[moved]
        self.reads[words] = records
        lost = ((self.reads[words] ^ records) & THREAD) >> 5 != 0  # to another warp that reads it just now
        if lost.any():
            self.others[words[lost]] = records[lost]

    def write(self, at, width, lanes, changed=None, lasting=True):
        """changed: where what is written is not what was there."""
        words, lanes = self.words(at, width, lanes)
        if self.strict:
            changed = None
        if changed is not None and width > self.word:
            changed = np.repeat(changed, width // self.word)
        self.check(self.writes[words], words, lanes, "writes what was written", changed)
        self.check(self.reads[words], words, lanes, "writes what was read", changed)
        self.check(self.others[words], words, lanes, "writes what was read", changed)
        if self.atomic:
            self.check(self.atomics[words], words, lanes, "writes what was changed")
        if not lasting:
            return
        if changed is not None and not changed.all():  # a value that is there already remains the first writer's
            words, lanes = words[changed], lanes[changed]
        records = self.records(lanes)
        self.writes[words] = records
        lost = self.writes[words] != records
        if lost.any():
            self.writes[words[lost]] |= TOGETHER

    def change(self, at, width, lanes):
        """An atomic instruction, or a load or store that is: among them there is no hazard."""
        words, lanes = self.words(at, width, lanes)
        self.atomic = True
        self.check(self.writes[words], words, lanes, "changes what was written")
        self.check(self.reads[words], words, lanes, "changes what was read")
        self.check(self.others[words], words, lanes, "changes what was read")
        self.atomics[words] = self.records(lanes)
