"""Warm up, stay, decay: the learning rate as a function of the step alone, so that a resumed run needs no state of it.

Nemotron 3 trains so; the minus-sqrt decay, lr * (1 - sqrt(t)) over the last part of the run, is that of "Scaling Laws
and Compute-Optimal Training Beyond Fixed Training Durations", 2024.
"""

import math
from dataclasses import dataclass

SHAPES = ("minus-sqrt", "linear")


@dataclass(frozen=True)
class Schedule:
    """peak: learning rate; steps: of the run, None while not yet known; warmup, decay: steps at the start and at the
    end (both 0 = constant)."""

    peak: float
    steps: int | None
    warmup: int = 0
    decay: int = 0
    shape: str = "minus-sqrt"
    floor: float = 0.01  # of the peak, at the last step: 1e-3 to 1e-5 in Nano, 4.5e-4 to 4.5e-6 in Super

    def at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        left = math.inf if self.steps is None else self.steps - step
        if left >= self.decay or self.decay == 0:
            return self.peak
        progress = min(1.0, 1 - (left - 1) / self.decay)
        fall = math.sqrt(progress) if self.shape == "minus-sqrt" else progress
        return self.peak * (1 - (1 - self.floor) * fall)


def as_steps(value: float, steps: int) -> int:
    """`--warmup 0.02` is a share of the run, `--warmup 100` a number of steps."""
    return round(value * steps) if value < 1 else int(value)


@dataclass(frozen=True)
class Budget:
    """A run of so many seconds: stable until what is left is the decay, and only then is the number of steps fixed, from
    the pace so far. That is what the stable phase is for; a pace measured at the start may be off many times over.

    decay: as in --decay, a share of the run or a number of steps."""

    seconds: float
    decay: float

    def steps(self, step: int, elapsed: float) -> int | None:
        """The number of steps of the whole run, once it is time to decide; None before."""
        pace = elapsed / step
        decay = self.decay * self.seconds if self.decay < 1 else self.decay * pace
        left = self.seconds - elapsed
        return None if left > decay else step + max(0, round(left / pace))
