"""What to know of the machine before torch is loaded."""

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
