"""What to know of the machine before torch is loaded."""

import ctypes
import os
import time


def share_of_idle_cpu(seconds: float = 0.1) -> float:
    """How much of the CPUs nobody used while this process slept; 1.0 where the system does not tell."""

    def ticks() -> list[int]:
        with open("/proc/stat") as lines:
            return [int(word) for word in next(lines).split()[1:9]]

    try:
        before = ticks()
        time.sleep(seconds)
        used = [b - a for a, b in zip(before, ticks(), strict=True)]
    except (OSError, ValueError):
        return 1.0
    return (used[3] + used[4]) / max(sum(used), 1)  # idle, and waiting for a disk


def share_the_cores() -> None:
    """On a busy machine, let OpenMP's threads sleep rather than spin where they wait for each other.

    A spinning thread holds the core that the one it waits for needs: on 2 cores wanted by two other processes, a
    training step of the tiny model ran 5 to 10 times faster without spinning. On a quiet machine spinning is faster.
    Must be called before torch is imported; a policy that the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ and share_of_idle_cpu() < 0.75:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next allocation, where it would hand large blocks back to the system.

    A step of training allocates the sizes of the step before; handed back, each page is cleared and mapped again when it
    is next touched: 4% to 11% of a step of a 1024-wide Mamba-2 layer, 2% to 5% of the tiny model's. Other C libraries,
    and limits that the user has set, stay as they are. Values: malloc.h; mallopt(3).
    """
    try:
        libc = ctypes.CDLL(None)
    except TypeError:  # Windows
        return
    if hasattr(libc, "mallopt") and not any(name.startswith("MALLOC_") for name in os.environ):
        trim_threshold, mmap_max, most = -1, -4, (1 << 31) - 1
        libc.mallopt(mmap_max, 0)  # no block is a mapping of its own, which free() would end
        libc.mallopt(trim_threshold, most)
